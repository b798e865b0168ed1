"""Blocks of one cache group: who holds them, which are free, which only the prefix index still keeps."""

from __future__ import annotations

from dataclasses import dataclass


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
        self._references = [0] * total_blocks  # lists: single elements of arrays take five times as long
        self._cached = [0] * total_blocks  # of the references, how many are the index's
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
        count = self._references[block]
        assert count > 0, "shared a block that nobody holds"
        if count == self._cached[block]:
            self._idle_blocks -= 1
        self._references[block] = count + 1
        return block

    def release(self, block: int) -> None:
        """Drop a request's reference."""
        count, cached = self._references[block] - 1, self._cached[block]
        assert count >= cached, "released more often than held"
        self._references[block] = count
        if count == 0:
            self._free.append(block)
        elif count == cached:
            self._idle_blocks += 1

    def keep(self, block: int) -> None:
        """Add a reference of the prefix index to a block that a request holds."""
        cached = self._cached[block]
        assert self._references[block] > cached, "cached a block that no request holds"
        if cached == 0:
            self._cached_blocks += 1
        self._cached[block] = cached + 1
        self._references[block] += 1

    def drop(self, block: int) -> None:
        """Drop a reference of the prefix index."""
        cached, count = self._cached[block] - 1, self._references[block] - 1
        assert cached >= 0, "dropped a block that was not cached"
        self._cached[block], self._references[block] = cached, count
        if cached == 0:
            self._cached_blocks -= 1
            if count == 0:
                self._free.append(block)
                self._idle_blocks -= 1

    def is_idle(self, block: int) -> bool:
        return 0 < self._cached[block] == self._references[block]

    def is_sole(self, block: int) -> bool:
        """Whether one request holds a block and nobody else does."""
        return self._references[block] == 1 and self._cached[block] == 0

    def references(self) -> list[int]:
        """Reference counts by block: for conservation checks."""
        return list(self._references)

    def check(self) -> None:
        """Raise AssertionError unless every block is counted exactly once."""
        held = sum(count > 0 for count in self._references)
        assert held + len(self._free) == self.total_blocks, "a block was lost"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(self._references[block] == 0 for block in self._free), "a free block is held"
        assert sum(self.is_idle(b) for b in range(self.total_blocks)) == self._idle_blocks, "the idle count drifted"
        assert sum(count > 0 for count in self._cached) == self._cached_blocks, "the cached count drifted"
