"""What the engine sees of a tier below the device: host RAM or disk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from thalweg.memory.record import Bytes, Record, RecordKind


@dataclass(frozen=True, slots=True)
class Piece:
    """The leading `units` units of a stored record of rows; `digest` is that of the last of them."""

    record: str
    first_unit: int
    units: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """Pieces that cover the units [0, units) of a prompt without gaps or overlaps, and the boundaries (in units before
    them, ascending, <= units) for which a checkpoint is stored."""

    pieces: tuple[Piece, ...]
    units: int
    checkpoints: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds now (`bytes` with what is reserved; of records alone by kind), and its counts since start."""

    capacity_bytes: int
    bytes: int
    rows_records: int
    rows_bytes: int
    checkpoint_records: int
    checkpoint_bytes: int
    hits: int = 0  # records read, or parts of them
    misses: int = 0  # reads of what was gone or damaged
    read_bytes: int = 0
    read_failures: int = 0  # of the misses: damaged or unreadable
    writes: int = 0
    write_bytes: int = 0
    dropped: int = 0  # writes that found no room or failed
    evicted: int = 0
    evicted_bytes: int = 0


class Tier(Protocol):
    """All methods may be called from any thread, and none raises for what the medium does: that is a miss."""

    def find(self, digests: Sequence[bytes]) -> Found:
        """How far a prompt is stored: `digests` of its units from the first one. Changes nothing."""

    def read_rows(self, piece: Piece, skip: int = 0) -> Bytes | None:
        """Verified rows of a piece's units after the first `skip` ones, uint8 [piece.units - skip, unit bytes], not to
        be written to; None: gone or damaged."""

    def read_checkpoint(self, digest: bytes) -> Bytes | None:
        """The verified checkpoint after a unit, uint8 [checkpoint bytes]; counts as a use of it. None: a miss."""

    def write(self, record: Record) -> bool:
        """Keep a record. True: it is stored (or was before). False: dropped, for want of room or by an error.

        Write what a record hangs on before it; after a False, whatever would hang on that record is of no use.
        """

    def touch(self, found: Found) -> None:
        """Count a use of all pieces."""

    def other_weights(self, origin: bytes, namespace: bytes) -> bool:
        """Whether the same tokens of the same tenant are stored for other weights. Only a disk can know."""

    def clear(self) -> int:
        """Forget everything; the bytes forgotten."""

    def usage(self) -> TierUsage:
        """What it holds and did."""

    def close(self) -> None:
        """Let go of files. Closing twice is allowed; nothing else is, afterwards."""


class Tally:
    """Counts that several threads add to, by the names of TierUsage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


def usage_of(
    capacity_bytes: int, other_bytes: int, totals: Mapping[RecordKind, tuple[int, int]], tally: Tally
) -> TierUsage:
    """The usage of a tier whose records, by kind, are so many and take so many bytes."""
    rows, checkpoints = totals.get(RecordKind.ROWS, (0, 0)), totals.get(RecordKind.CHECKPOINT, (0, 0))
    held = other_bytes + rows[1] + checkpoints[1]
    return TierUsage(capacity_bytes, held, *rows, *checkpoints, **tally.counts())
