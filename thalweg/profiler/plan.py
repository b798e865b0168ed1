"""What a measurement covers: its grid, how often, and how long it may take. Data only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import log
from typing import Any

from thalweg.errors import ConfigError

STAGES = ("surfaces", "cache", "checks", "company", "load")
# Of the time: a stage may also use what those before it left.
SHARES = {"surfaces": 0.5, "cache": 0.25, "checks": 0.05, "company": 0.08, "load": 0.12}


@dataclass(frozen=True, slots=True)
class Plan:
    """Cells and limits. Contexts and shares of the hold-out lie between those of the grid."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    samples: int  # rounds over all cells
    visit_seconds: float  # of a cell in a round, where one answer takes less
    output_tokens: int
    budget_seconds: float
    fill_tokens: tuple[int, ...]  # lengths of the prompts that fill the cache
    most_fill_tokens: int  # after so many without an eviction the capacity is only a bound
    check_contexts: tuple[int, ...]
    company_tokens: int  # of the long prompt beside others
    load_context: int
    load_reuse: float
    load_output: int
    concurrencies: tuple[int, ...]
    rates: tuple[float, ...]  # of the best closed throughput
    load_seconds: float  # of one level
    idle_seconds: tuple[float, ...]  # after which a prefix is asked for again
    ttft_limit: float
    tpot_limit: float
    reuses: tuple[float, ...] = (0.0, 0.5, 0.9, 1.0)
    holdout: bool = True
    stages: tuple[str, ...] = STAGES
    seed: int = 0

    def fields(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return dict(json.loads(json.dumps(asdict(self))))

    def digest(self) -> str:
        """Names the cells that are measured: samples of plans that differ only in the time allowed fit together."""
        fields = {k: v for k, v in self.fields().items() if k not in ("budget_seconds", "stages", "samples")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Raises ConfigError for what cannot be measured, naming the field and the limit."""
        for name in ("contexts", "batches", "decode_contexts", "fill_tokens", "concurrencies"):
            values = getattr(self, name)
            if any(value < 1 for value in values) or list(values) != sorted(set(values)):
                raise ConfigError(f"{name}: {list(values)} must be rising numbers from 1 on", param=name)
        if not self.contexts or self.contexts[0] < 64:
            raise ConfigError(f"contexts: {list(self.contexts)} must begin at 64 tokens or more", param="contexts")
        if any(not 0 <= reuse <= 1 for reuse in self.reuses) or 0.0 not in self.reuses:
            raise ConfigError(f"reuses: {list(self.reuses)} must be shares from 0 to 1, with 0", param="reuses")
        for stage in self.stages:
            if stage not in STAGES:
                raise ConfigError(f"stages: {stage!r} is none of {', '.join(STAGES)}", param="stages")
        if self.samples < 1 or self.budget_seconds <= 0 or self.output_tokens < 8:
            raise ConfigError("samples, budget and output must be at least 1, above 0 s, and 8 tokens", param="samples")


def grid(least: int, most: int, step: float) -> tuple[int, ...]:
    """Lengths from `least` to `most`, each about `step` times the one before."""
    count = max(0, round(log(most / least) / log(step)))
    return tuple(round(least * (most / least) ** (i / count)) if count else least for i in range(count + 1))


def usual_plan(max_context: int, *, quick: bool, **changes: Any) -> Plan:
    """The grid for an endpoint whose prompts may have `max_context` tokens. `changes` that are None are left alone."""
    allowed = max_context * 7 // 8  # answers need room too
    longest = max(256, min(allowed, 4096 if quick else 65536))
    contexts = changes.get("contexts") or grid(min(512, longest), longest, 2.83 if quick else 4)
    most = contexts[-1]
    if most > max(256, allowed):
        raise ConfigError(f"contexts: {most} is over {allowed}, 7/8 of what the endpoint takes", param="contexts")
    fields = _quick(contexts) if quick else _whole(contexts)
    fields |= {"ttft_limit": 5.0, "tpot_limit": 0.02}
    fields |= {name: value for name, value in changes.items() if value is not None}
    plan = Plan(**fields)
    plan.check()
    return plan


def _quick(contexts: tuple[int, ...]) -> dict[str, Any]:
    """Two to three minutes of a small model."""
    most = contexts[-1]
    return {
        "contexts": contexts,
        "batches": (1, 4),
        "decode_contexts": _rising(contexts[0], most),
        "samples": 3,
        "visit_seconds": 0.2,
        "output_tokens": 32,
        "budget_seconds": 150.0,
        "fill_tokens": _rising(most // 8, most // 4, most),
        "most_fill_tokens": 100_000,
        "check_contexts": (most // 2,),
        "company_tokens": most,
        "load_context": most // 2,
        "load_reuse": 0.9,
        "load_output": 16,
        "concurrencies": (1, 4),
        "rates": (0.7,),
        "load_seconds": 3.0,
        "idle_seconds": (2.0,),
    }


def _whole(contexts: tuple[int, ...]) -> dict[str, Any]:
    """Half an hour."""
    most = contexts[-1]
    return {
        "contexts": contexts,
        "batches": (1, 2, 4, 8),
        "decode_contexts": _rising(contexts[0], contexts[len(contexts) // 2], most),
        "samples": 20,
        "visit_seconds": 1.0,
        "output_tokens": 128,
        "budget_seconds": 1800.0,
        "fill_tokens": (1024, 2048, 4096),
        "most_fill_tokens": 2_000_000,
        "check_contexts": _rising(min(1024, most), min(8192, most)),
        "company_tokens": most,
        "load_context": min(8192, most),
        "load_reuse": 0.9,
        "load_output": 64,
        "concurrencies": (1, 2, 4, 8, 16),
        "rates": (0.5, 0.8, 1.1),
        "load_seconds": 15.0,
        "idle_seconds": (5.0, 30.0),
    }


def _rising(*lengths: int) -> tuple[int, ...]:
    return tuple(sorted(set(lengths)))


def between(values: tuple[int, ...]) -> tuple[int, ...]:
    """The geometric middles of neighbours: where a surface is least sure of itself."""
    return tuple(round((a * b) ** 0.5) for a, b in pairwise(values))
