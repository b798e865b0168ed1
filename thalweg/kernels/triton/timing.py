"""Times of kernels on a GPU beside the least that it could take, with everything that makes a time repeatable."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thalweg.kernels.cases.case import Case, Source
from thalweg.kernels.floors import Limits, floor
from thalweg.kernels.ops import Kernels
from thalweg.kernels.spec import spec_of
from thalweg.kernels.triton.stopwatch import Stopwatch

COLD_BYTES = 1 << 27  # of all inputs together: more than twice the second-level cache of H100 and H200 (50 MB)
MOST_SETS = 16  # of inputs that take turns
SERIES = 7  # whose median and spread are reported


@dataclass(frozen=True, slots=True)
class Series:
    """Mean seconds of a call, by the stopwatch's name, once for each series."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, watch: str) -> float:
        return statistics.median(self.seconds[watch])

    @property
    def best(self) -> float:
        """The median under the faster of the ways to launch."""
        return min(self.median(watch) for watch in self.seconds)


def series(case: Case, kernels: Kernels, watches: tuple[Stopwatch, ...], dtype: torch.dtype, seed: int = 0) -> Series:
    """Several sets of fresh inputs take turns, so that none is in a cache because the last call left it there."""
    count = max(1, min(MOST_SETS, COLD_BYTES // max(1, int(spec_of(case.op).bytes(case.sizes)))))
    binds = [case.inputs(Source(seed + number, narrow=True)) for number in range(count)]
    calls = tuple(bind(kernels, dtype)(None) for bind in binds)
    for call in calls:  # compile, and take what an allocator keeps
        call()
    return Series({watch.name: tuple(watch.seconds(calls) for _ in range(SERIES)) for watch in watches})


def record(
    case: Case, taken: Series, plain: Series | None, limits: tuple[Limits, ...], multiplied: str
) -> dict[str, Any]:
    """One line: costs, every floor with its binding term, times, shares of the floors, and S against plain torch.

    S = 1 / (1 + (T - floor) / (T_plain - floor)), of SOL-ExecBench: a half is as slow as plain torch, one the floor.
    """
    spec = spec_of(case.op)
    flops, size = float(spec.flops(case.sizes)), float(spec.bytes(case.sizes))
    floors = {one.origin: floor(spec, case.sizes, one, multiplied) for one in limits}
    least = floors[limits[-1].origin].seconds
    line: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "multiplied": multiplied,
        "flops": flops,
        "bytes": size,
        "flops_per_byte": flops / size,
        "floors": {name: {"seconds": one.seconds, "term": one.term} for name, one in floors.items()},
        "seconds": {watch: statistics.median(runs) for watch, runs in taken.seconds.items()},
        "runs": {watch: list(runs) for watch, runs in taken.seconds.items()},
        "share_of_floor": {name: one.seconds / taken.best for name, one in floors.items()},
        "tflops": flops / taken.best / 1e12,
        "gbytes_per_second": size / taken.best / 1e9,
    }
    if plain is not None:
        ahead = max(plain.best - least, 1e-12)
        line |= {"plain_torch_seconds": plain.best, "score": 1 / (1 + max(0.0, taken.best - least) / ahead)}
    return line
