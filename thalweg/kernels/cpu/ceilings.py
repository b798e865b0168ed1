"""What this machine can do at most: fp32 multiply-adds and bytes read, measured by loops that do nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from thalweg.kernels.cpu.library import Library, address

_READ_FLOATS = 1 << 26  # 256 MiB: no cache holds it
_ROUNDS = 300_000  # a millisecond or less: where others compute too, some runs are left alone
_REPEATS = 40
_READS = 12
_PRODUCT = 1024  # rows and columns of the matrices that stand in where no library was built


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of several runs. `how` says what measured them."""

    flops: float  # per second, a multiply-add being two
    bytes: float  # read per second
    threads: int
    how: str

    def limit_seconds(self, flops: float, size: float) -> float:
        """The least time for so much arithmetic and so many bytes, both at once."""
        return max(flops / self.flops, size / self.bytes)


def measured_ceilings(library: Library | None, threads: int) -> Ceilings:
    """Without a library torch's own matrix product and sum are taken for the loops."""
    data = torch.ones(_READ_FLOATS)
    if library is None:
        left, right = torch.ones(_PRODUCT, _PRODUCT), torch.ones(_PRODUCT, _PRODUCT)
        flops = 2 * _PRODUCT**3 / _best(lambda: torch.mm(left, right), _READS)
        return Ceilings(flops, 4 * _READ_FLOATS / _best(data.sum, _READS), threads, "torch")
    result = torch.zeros(2)
    arithmetic = _best(lambda: library.arithmetic(_ROUNDS, address(result), threads), _REPEATS)
    flops = 2 * float(result[1]) * _ROUNDS * threads / arithmetic
    reading = _best(lambda: library.reading(address(data), _READ_FLOATS, address(result), threads), _READS)
    return Ceilings(flops, 4 * _READ_FLOATS / reading, threads, library.level.value)


def _best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run: other work on the machine only adds to it."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
