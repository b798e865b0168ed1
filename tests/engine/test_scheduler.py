"""The scheduling policy without a model or a clock: nobody starves, prompts share, late comers give way."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.shapes import MODEL, coordinator_of
from thalweg.cache.prefix_index import Namespace
from thalweg.engine.request import Sequence
from thalweg.engine.scheduler import Scheduler, SchedulerLimits
from thalweg.engine.tiering import Tiering
from thalweg.types import GenerateRequest, SamplingParams


def make(units: int = 400, budget: int = 64, running: int = 4) -> Scheduler:
    coordinator = coordinator_of(MODEL, units, 64, running=running)
    return Scheduler(
        Tiering(coordinator, {}, None),
        SchedulerLimits(running, budget),
        lambda s: Namespace(s.request.cache_salt.encode()),
    )


def add(scheduler: Scheduler, name: str, prompt: int, output: int = 4) -> Sequence:
    tokens = np.random.default_rng(len(name) + prompt).integers(0, 90, prompt).astype(np.int32)
    request = GenerateRequest(name, tokens, SamplingParams(max_tokens=output), cache_salt=name)
    sequence = Sequence(request, lambda event: None, output, 0.0)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[str, int]:
    """One step: tokens by request. Every request that samples gets token 3."""
    plan = scheduler.plan()
    scheduler.commit(plan)
    for item in plan.sequences:
        sequence = item.running.sequence
        if item.samples:
            sequence.append(3)
            if sequence.output_tokens >= sequence.max_output_tokens:
                scheduler.finish(item.running, keep_state=True)
    scheduler.coordinator.check()
    assert plan.tokens <= scheduler.limits.max_step_tokens
    return {item.request_id: item.tokens for item in plan.sequences}


def test_decodes_come_first_and_short_prompts_pass_a_long_one_that_still_advances() -> None:
    scheduler = make(budget=64)
    add(scheduler, "long", 2000)
    assert step(scheduler) == {"long": 32}, "half a step stays free for whoever comes"
    add(scheduler, "short", 40, output=8)
    shares = step(scheduler)
    assert shares["short"] == 40 and shares["long"] == 24
    shares = step(scheduler)
    assert shares == {"short": 1, "long": 32}
    add(scheduler, "middle", 200)
    shares = step(scheduler)
    assert shares["short"] == 1 and shares["long"] >= 16 and shares["middle"] == 63 - shares["long"]


def test_waiting_requests_start_in_order_of_arrival() -> None:
    scheduler = make(running=2)
    for name in ("a", "bb", "ccc"):
        add(scheduler, name, 10, output=2)
    assert set(step(scheduler)) == {"a", "bb"}
    step(scheduler)
    assert set(step(scheduler)) == {"ccc"}


def test_the_last_admitted_gives_way_when_blocks_run_short() -> None:
    scheduler = make(units=6, budget=1000)
    first, second = add(scheduler, "a", 250, output=200), add(scheduler, "bb", 250, output=200)
    seen = [step(scheduler) for _ in range(420)]
    assert second.preemptions > 0 and first.preemptions == 0
    assert first.output_tokens == second.output_tokens == 200
    assert not scheduler.running and not scheduler.waiting
    assert sum(s.get("a", 0) for s in seen) == 250 + 199


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 600), st.integers(1, 40)), min_size=1, max_size=10),
    st.integers(3, 100),
    st.integers(1, 4),
)
def test_everybody_ends_under_any_arrival_order(arrivals, budget: int, running: int) -> None:
    """No starvation: after the last arrival, the work left bounds the steps left."""
    scheduler = make(units=12, budget=budget, running=running)
    sequences = []
    waiting = sorted((when, f"r{i}" * (i + 1), p, o) for i, (when, p, o) in enumerate(arrivals))
    for now in range(31):
        sequences += [add(scheduler, name, p, o) for when, name, p, o in waiting if when == now]
        step(scheduler)
    work = sum(p + o for _, p, o in arrivals)
    for _ in range(8 * work + 100):
        if not (scheduler.running or scheduler.waiting):
            break
        step(scheduler)
    assert all(s.output_tokens == s.max_output_tokens for s in sequences)
