"""Which block of a pool holds which tokens of one sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 64


class GrowingTable:
    """Blocks of a compressed group: one for every block number from 0, appended in order."""

    def __init__(self) -> None:
        self._ids = np.empty(_FIRST_CAPACITY, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, block: int) -> None:
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._count] = block
        self._count += 1

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < self._count:
            raise KeyError(number)
        return int(self._ids[number])

    def replace(self, number: int, block: int) -> int:
        """Put another block at a number; returns the one that was there."""
        old = self[number]
        self._ids[number] = block
        return old

    def ids(self, count: int) -> npt.NDArray[np.int64]:
        """The first `count` block ids, without a copy."""
        return self._ids[:count]

    def blocks(self) -> Iterator[int]:
        return iter(self._ids[: self._count].tolist())


class SlidingTable:
    """Blocks of a group that lets old ones go: the few block numbers that are alive."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, number: int) -> bool:
        return number in self._ids

    def __getitem__(self, number: int) -> int:
        return self._ids[number]

    def get(self, number: int) -> int:
        """The block at a number, or -1."""
        return self._ids.get(number, -1)

    def put(self, number: int, block: int) -> None:
        assert number not in self._ids, "a block number was given twice"
        self._ids[number] = block

    def pop(self, number: int) -> int:
        return self._ids.pop(number)

    def numbers(self) -> tuple[int, ...]:
        return tuple(self._ids)

    def blocks(self) -> Iterator[int]:
        return iter(tuple(self._ids.values()))
