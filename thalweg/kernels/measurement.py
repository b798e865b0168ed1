"""Times of ops beside the least that this machine could take: the kernel report of `thalweg kernels bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thalweg.kernels.cases.case import Call, Case, Source
from thalweg.kernels.cpu.ceilings import Ceilings
from thalweg.kernels.ops import Kernels
from thalweg.kernels.spec import spec_of

LEAST_RUNS = 3
_LONG_SECONDS = 5.0  # a run that takes so long is not repeated


@dataclass(frozen=True, slots=True)
class Contender:
    """A backend's name and kernels."""

    backend: str
    kernels: Kernels


@dataclass(frozen=True, slots=True)
class Timing:
    """One case on one backend. `seconds` are of every run, in order."""

    case: Case
    backend: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def flops(self) -> float:
        return float(spec_of(self.case.op).flops(self.case.sizes))

    @property
    def bytes(self) -> float:
        return float(spec_of(self.case.op).bytes(self.case.sizes))

    def limit(self, ceilings: Ceilings) -> float:
        """Seconds that the arithmetic and the bytes of the op take at the least."""
        return ceilings.limit_seconds(self.flops, self.bytes)


def timings(case: Case, contenders: Sequence[Contender], seconds: float, seed: int = 0) -> list[Timing]:
    """Each contender in turn, again and again, for about so many seconds each: what else the machine does meets all
    of them alike. The first round warms caches and counts only where nothing is repeated."""
    bind = case.inputs(Source(seed))
    calls = [bind(contender.kernels, torch.float32)(None) for contender in contenders]
    spent: list[list[float]] = [[] for _ in calls]
    first = [_timed(call) for call in calls]
    while any(not _enough(own, once, seconds) for own, once in zip(spent, first, strict=True)):
        for call, own, once in zip(calls, spent, first, strict=True):
            if not _enough(own, once, seconds):
                own.append(_timed(call))
    found = zip(contenders, spent, first, strict=True)
    return [Timing(case, contender.backend, tuple(own or [once])) for contender, own, once in found]


def _enough(own: list[float], first: float, seconds: float) -> bool:
    return first > _LONG_SECONDS or (len(own) >= LEAST_RUNS and sum(own) >= seconds)


def _timed(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def record(timing: Timing, ceilings: Ceilings, reference_seconds: float) -> dict[str, Any]:
    """One line of the report, in plain values."""
    limit = timing.limit(ceilings)
    rate = ceilings.read(timing.bytes)
    return {
        "op": timing.case.op,
        "shape": timing.case.shape,
        "sizes": dict(timing.case.sizes),
        "backend": timing.backend,
        "threads": ceilings.threads,
        "seconds": timing.median,
        "fastest_seconds": min(timing.seconds),
        "runs": len(timing.seconds),
        "flops": timing.flops,
        "bytes": timing.bytes,
        "gflops_per_second": timing.flops / timing.median / 1e9,
        "gbytes_per_second": timing.bytes / timing.median / 1e9,
        "limit_seconds": limit,
        "limited_by": "arithmetic" if timing.flops / ceilings.flops >= timing.bytes / rate else "reading",
        "times_the_limit": timing.median / limit,
        "speedup_over_reference": reference_seconds / timing.median,
        "ceiling_gflops": ceilings.flops / 1e9,
        "ceiling_gbytes": rate / 1e9,
        "ceilings_by": ceilings.how,
    }
