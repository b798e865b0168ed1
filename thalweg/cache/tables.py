"""Which block of a pool holds which tokens of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from thalweg.cache.geometry import CacheGroupSpec
from thalweg.cache.pool import BlockPool
from thalweg.config.model import UNIT_TOKENS

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
    """Blocks of a group that lets old ones go: the few block numbers that are alive.

    A request keeps some of the blocks that it let go, to give them its next numbers: most steps then leave the pool as
    it is. These few are `spare`.
    """

    def __init__(self, spec: CacheGroupSpec) -> None:
        assert spec.blocks_behind is not None, "a compressed group never lets a block go"
        self.spare: list[int] = []
        self._ids: dict[int, int] = {}
        self._spec = spec
        self._size, self._behind = spec.tokens_per_block, spec.blocks_behind
        self._unit = UNIT_TOKENS

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

    def spare_if_few(self, block: int) -> bool:
        """Keep a block that nobody else holds for later numbers; False if there are enough."""
        if len(self.spare) > self._behind:
            return False
        self.spare.append(block)
        return True

    def quiet_until(self, position: int, unit_end: int, kept: range, is_sole: Callable[[int], bool]) -> int:
        """The furthest position before `unit_end` to which steps of one token take no block from the pool and give none
        back. `kept` are the numbers of the last boundary's checkpoint, which stay in any case."""
        size = self._size
        if unit_end % size == 0 and unit_end - size <= position - position % size:  # the unit's last block
            return unit_end - 1 if position // size in self._ids else position
        held = len(self._ids) + len(self.spare)
        least = len(kept) + self._behind  # held after a step that lets one go
        settled = least < held <= least + self._behind + 1
        if settled and all(is_sole(block) for number, block in self._ids.items() if number not in kept):
            return unit_end - 1
        return position if position % size == 0 else position - position % size + size - 1

    def lacks(self, position: int) -> bool:
        """Whether a block must come from the pool before the token at `position` is computed."""
        return not self.spare and position // self._size not in self._ids

    def begin(self, position: int, kept: range, pool: BlockPool) -> None:
        """A block for the token at `position`, its own or one of the pool, which has one; and one more if it is free,
        where the next tokens of the unit will need that."""
        number = position // self._size
        if number not in self._ids:
            self._ids[number] = self.spare.pop() if self.spare else pool.allocate()
        if (
            len(self._ids) + len(self.spare) <= len(kept) + self._behind
            and self._size < self._unit
            and pool.free_blocks
        ):
            self.spare.append(pool.allocate())

    def end(self, end: int, kept: range, pool: BlockPool) -> None:
        """After the token before `end` was computed: let go of what is not needed any more."""
        old = end // self._size - self._behind - 1
        if end % self._size == 0 and old in self._ids and old not in kept:
            block = self._ids.pop(old)
            if not (pool.is_sole(block) and self.spare_if_few(block)):
                pool.release(block)

    def begin_quiet(self, position: int) -> None:
        """Before the token at `position` is computed in such a step: a block for it."""
        if position % self._size == 0 and position // self._size not in self._ids:
            self._ids[position // self._size] = self.spare.pop()

    def end_quiet(self, end: int, kept: range) -> None:
        """After the token before `end` was computed in such a step: what it does not need any more is spare."""
        old = end // self._size - self._behind - 1
        if end % self._size == 0 and old in self._ids and old not in kept:
            self.spare.append(self._ids.pop(old))

    def advance(self, position: int, end: int, kept: range) -> None:
        """Steps from `position` to `end`, within what `quiet_until` allows."""
        size, ids = self._size, self._ids
        if position // size == end // size and position % size:
            return
        live = self._spec.live_numbers(end)
        for number in [n for n in ids if n not in live and n not in kept]:
            self.spare.append(ids.pop(number))
        for number in live:
            if number not in ids:
                ids[number] = self.spare.pop()

    def kept(self, boundary: int) -> range:
        """Numbers of a checkpoint at a unit boundary."""
        return self._spec.checkpoint_numbers(boundary)

    def numbers(self) -> tuple[int, ...]:
        return tuple(self._ids)

    def blocks(self) -> Iterator[int]:
        """Those at the numbers, in their order, then the spare ones."""
        return iter((*self._ids.values(), *self.spare))
