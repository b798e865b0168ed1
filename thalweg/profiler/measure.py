"""A whole measurement: find out who is there, go through the stages, and write down what was found."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from thalweg import __version__
from thalweg.profiler.caching import cache_facts, held_out_fills, measure_cache
from thalweg.profiler.checks import checks, measure_checks
from thalweg.profiler.client import Client
from thalweg.profiler.company import interference, measure_company, queueing
from thalweg.profiler.detect import detect, same_endpoint
from thalweg.profiler.load import loads, measure_load
from thalweg.profiler.plan import STAGES, Plan
from thalweg.profiler.profile import FORMAT, EndpointFacts, Objectives, Profile
from thalweg.profiler.session import Report, Session
from thalweg.profiler.store import SampleFile
from thalweg.profiler.timing import holdout_cells, measure_surfaces, tpot_cells, ttft_cells

SAMPLES, PROFILE = "samples.jsonl", "profile.json"
_WARM_UP = "the first round of each cell finds its length and warms the endpoint; it is in no median"
_NO_LENGTH = 131_072  # tokens, where the endpoint does not say how long prompts may be


async def measure(
    client: Client,
    planned: Callable[[int], Plan],
    folder: Path,
    report: Report,
    *,
    model: str | None = None,
    fresh: bool = False,
) -> Profile:
    """Measure what is missing in `folder`, and write its profile. `planned` makes the plan from the longest context.

    Raises UnavailableError if the endpoint fails; what was measured until then is kept and not measured again.
    """
    facts, form = await detect(client, model, 0)
    plan = planned(facts.max_model_len or _NO_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "plan": plan.digest(), **same_endpoint(facts)}
    samples = SampleFile(folder / SAMPLES, header, fresh=fresh)
    session = Session(client, form, plan, samples, report, facts)
    stages: dict[str, Callable[[Session], Awaitable[None]]] = {
        "surfaces": measure_surfaces,
        "cache": measure_cache,
        "checks": measure_checks,
        "company": measure_company,
        "load": measure_load,
    }
    try:
        for stage in STAGES:
            if session.begin(stage):
                await stages[stage](session)
            profile = profile_of(session, facts)
            profile.write(folder / PROFILE)
    finally:
        samples.close()
    return profile


def profile_of(session: Session, facts: EndpointFacts) -> Profile:
    """What all samples so far say."""
    plan = session.plan
    objectives = Objectives(plan.ttft_limit, plan.tpot_limit)
    held_out = holdout_cells(session)
    return Profile(
        format=FORMAT,
        thalweg=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(session.samples.seconds, 1),
        plan=plan.fields(),
        endpoint=facts,
        objectives=objectives,
        warm_up=_WARM_UP,
        ttft_cells=ttft_cells(session),
        tpot_cells=tpot_cells(session),
        cache=cache_facts(session),
        interference=interference(session),
        queueing=queueing(session),
        checks=checks(session),
        loads=loads(session, objectives),
        holdout=held_out.with_fills(held_out_fills(session)),
        surface={},
        left_out=session.omissions(),
        machine=_machine(),
    ).with_surface()


def _machine() -> dict[str, Any]:
    """Where the measuring was done from."""
    return {
        "machine": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }
