"""Blocks of one cache group: who holds them, which are free, which only the prefix index still keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """A snapshot of one pool, in blocks."""

    group: str
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    idle_blocks: int


class BlockPool:
    """A fixed number of blocks with reference counts.

    A block is free (no reference), idle (only the prefix index holds it) or in use. The index may hold a block more
    than once: where the window is wider than a unit, neighbouring checkpoints share window blocks.
    """

    def __init__(self, total_blocks: int) -> None:
        self.total_blocks = total_blocks
        self._free = list(range(total_blocks - 1, -1, -1))
        self._references = np.zeros(total_blocks, np.int32)
        self._cached = np.zeros(total_blocks, np.int32)  # of the references, how many are the index's
        self._idle_blocks = 0
        self._cached_blocks = 0

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def idle_blocks(self) -> int:
        """Blocks that eviction from the prefix index would free."""
        return self._idle_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that the prefix index holds, in use or idle."""
        return self._cached_blocks

    def allocate(self) -> int:
        """Take one free block; the caller holds its only reference and has checked `free_blocks`."""
        block = self._free.pop()
        assert self._references[block] == 0, "a free block had references"
        self._references[block] = 1
        return block

    def share(self, block: int) -> int:
        """Add a reference of a request to a block that somebody holds."""
        assert self._references[block] > 0, "shared a block that nobody holds"
        if self._idle(block):
            self._idle_blocks -= 1
        self._references[block] += 1
        return block

    def release(self, block: int) -> None:
        """Drop a request's reference."""
        assert self._references[block] > self._cached[block], "released more often than held"
        self._references[block] -= 1
        if self._idle(block):
            self._idle_blocks += 1
        elif self._references[block] == 0:
            self._free.append(block)

    def keep(self, block: int) -> None:
        """Add a reference of the prefix index to a block that a request holds."""
        assert self._references[block] > self._cached[block], "cached a block that no request holds"
        self._cached_blocks += int(self._cached[block] == 0)
        self._cached[block] += 1
        self._references[block] += 1

    def drop(self, block: int) -> None:
        """Drop a reference of the prefix index."""
        assert self._cached[block] > 0, "dropped a block that was not cached"
        was_idle = self._idle(block)
        self._cached[block] -= 1
        self._references[block] -= 1
        self._cached_blocks -= int(self._cached[block] == 0)
        if self._references[block] == 0:
            self._free.append(block)
        self._idle_blocks -= was_idle and not self._idle(block)

    def is_idle(self, block: int) -> bool:
        return self._idle(block)

    def _idle(self, block: int) -> bool:
        return bool(0 < self._cached[block] == self._references[block])

    def references(self) -> np.ndarray:
        """Reference counts, int32 [total_blocks]: for conservation checks."""
        return self._references.copy()

    def check(self) -> None:
        """Raise AssertionError unless every block is counted exactly once."""
        held = int((self._references > 0).sum())
        assert held + len(self._free) == self.total_blocks, "a block was lost"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(self._references[block] == 0 for block in self._free), "a free block is held"
        idle = int(((self._references == self._cached) & (self._cached > 0)).sum())
        assert idle == self._idle_blocks, "the idle count drifted"
        assert int((self._cached > 0).sum()) == self._cached_blocks, "the cached count drifted"
