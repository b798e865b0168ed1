"""What this machine can do at most: fp32 multiply-adds and bytes read, measured by loops that do nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from thalweg.kernels.cpu.library import Library, address

READ_BYTES = (1 << 18, 1 << 23, 1 << 28)  # for most machines: a core's own cache, the shared one, memory
_PASSES = (1 << 8, 1 << 3, 1)  # over those, so that one run takes about as long as another
_ROUNDS = 300_000  # a millisecond or less: where others compute too, some runs are left alone
_REPEATS = 40
_READS = 12
_PRODUCT = 1024  # rows and columns of the matrices that stand in where no library was built


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of several runs, per second, a multiply-add being two operations. `reads` are for READ_BYTES bytes that
    are read again and again, as the inputs of an op are when it is timed; `how` says what measured."""

    flops: float
    reads: tuple[float, ...]
    threads: int
    how: str

    def read(self, size: float) -> float:
        """Bytes per second where so many are read."""
        fitting = [rate for most, rate in zip(READ_BYTES, self.reads, strict=True) if size <= most]
        return fitting[0] if fitting else self.reads[-1]

    def limit_seconds(self, flops: float, size: float) -> float:
        """The least time for so much arithmetic and so many bytes, both at once."""
        return max(flops / self.flops, size / self.read(size))


def measured_ceilings(library: Library | None, threads: int) -> Ceilings:
    """Without a library torch's own matrix product and sum are taken for the loops."""
    data = torch.ones(READ_BYTES[-1] // 4)
    if library is None:
        left, right = torch.ones(_PRODUCT, _PRODUCT), torch.ones(_PRODUCT, _PRODUCT)
        flops = 2 * _PRODUCT**3 / _best(lambda: torch.mm(left, right), _READS)
        return Ceilings(
            flops, tuple(size / _best(data[: size // 4].sum, _READS) for size in READ_BYTES), threads, "torch"
        )
    result = torch.zeros(2)
    arithmetic = _best(lambda: library.arithmetic(_ROUNDS, address(result), threads), _REPEATS)
    flops = 2 * float(result[1]) * _ROUNDS * threads / arithmetic
    reads = []
    for size, passes in zip(READ_BYTES, _PASSES, strict=True):
        given = (address(data), size // 4, passes, address(result), threads)
        reads.append(size * passes / _best(partial(library.reading, *given), _READS))
    return Ceilings(flops, tuple(reads), threads, library.level.value)


def _best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run: other work on the machine only adds to it."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
