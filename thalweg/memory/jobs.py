"""What is to be copied between the pools and the lower tiers, as values, and who copies it. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from thalweg.cache.geometry import Group
from thalweg.memory.record import Bytes, RecordHead
from thalweg.memory.tier import Piece

Blocks = Mapping[Group, Sequence[int]]


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Copy a record's bytes out of these blocks, then write them to every tier. `gathered` is set once the blocks may
    be used for something else. `tiers`: names of the tiers that take it."""

    head: RecordHead
    blocks: Blocks
    tiers: tuple[str, ...]
    gathered: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class LoadPart:
    """The units of a piece after the first `skip` ones go to these blocks."""

    tier: str
    piece: Piece
    skip: int
    blocks: Blocks

    @property
    def units(self) -> int:
        return self.piece.units - self.skip


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Parts in the order of their units, and a checkpoint as (tier, digest of its unit, blocks)."""

    parts: tuple[LoadPart, ...]
    checkpoint: tuple[str, bytes, Blocks] | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How many leading parts arrived, and whether the checkpoint did."""

    parts: int
    checkpoint: bool


class Mover(Protocol):
    """Copies in the background. `done` is called once per job, on any thread, and must not block."""

    def store(self, job: StoreJob, done: Callable[[Sequence[bool]], None]) -> None:
        """`done` hears of each tier whether it has the record now."""

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None: ...

    def take_out(self, blocks: Blocks) -> Mapping[Group, Bytes]:
        """The bytes of these blocks, uint8 [blocks, block bytes] by group, at once."""

    def put_back(self, data: Mapping[Group, Bytes], blocks: Blocks, done: Callable[[bool], None]) -> None:
        """The inverse of `take_out`. done(False): it failed."""

    def block_bytes(self, group: Group) -> int: ...

    def close(self) -> None:
        """Finish what was begun, then end."""

    def abandon(self) -> None:
        """End once no copy is under way. What has not begun never will, and its `done` need not be called."""
