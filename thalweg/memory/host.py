"""The tier in host RAM: whole records, never more bytes than its capacity."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from thalweg.memory.catalogue import Catalogue, Entry, entry_of
from thalweg.memory.record import DIGEST_BYTES, Bytes, Record, checkpoint_name
from thalweg.memory.tier import Found, Piece, Tally, TierUsage, usage_of


class HostTier:
    """A Tier. `capacity_bytes` counts payloads, digests and what is reserved; each record takes about 1 KB more."""

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.capacity_bytes = capacity_bytes
        self._clock = clock
        self._catalogue = Catalogue(None)
        self._records: dict[str, Record] = {}
        self._reserved_bytes = 0
        self._room = threading.Lock()  # held while room is taken: records and reservations share one capacity
        self._tally = Tally()

    def find(self, digests: Sequence[bytes]) -> Found:
        return self._catalogue.find(digests)

    def read_rows(self, piece: Piece, skip: int = 0) -> Bytes | None:
        return self._read(piece.record, skip, piece.units)

    def read_checkpoint(self, digest: bytes) -> Bytes | None:
        name = checkpoint_name(digest)
        self._catalogue.use({name: 1}, self._clock())
        rows = self._read(name, 0, 1)
        return None if rows is None else rows[0]

    def write(self, record: Record) -> bool:
        """See Tier. The tier keeps the record's array itself, not a copy."""
        head = record.head
        size = record.data.nbytes + DIGEST_BYTES * len(head.digests)
        with self._room:
            if head.name in self._records:
                return True
            self._records[head.name] = record
            entry = entry_of(head, size, self._clock(), durable=True)
            if not self._catalogue.admit(entry, lambda _: self.capacity_bytes - self._reserved_bytes, self._evict):
                del self._records[head.name]
                self._tally.add(dropped=1)
                return False
        self._tally.add(writes=1, write_bytes=record.data.nbytes)
        return True

    def reserve(self, size_bytes: int) -> bool:
        """Take bytes of the capacity for something else, evicting records. False, and nothing taken, if too few."""
        with self._room:
            left = self.capacity_bytes - self._reserved_bytes - size_bytes
            if left < 0 or not self._catalogue.shrink(lambda _: left, self._evict):
                return False
            self._reserved_bytes += size_bytes
            return True

    def release(self, size_bytes: int) -> None:
        """Give reserved bytes back."""
        with self._room:
            assert 0 <= size_bytes <= self._reserved_bytes, "released more than was reserved"
            self._reserved_bytes -= size_bytes

    def touch(self, found: Found) -> None:
        self._catalogue.use({piece.record: 1 for piece in found.pieces}, self._clock())

    def other_weights(self, origin: bytes, namespace: bytes) -> bool:
        """False: what is in RAM is of the weights that run."""
        return False

    def clear(self) -> int:
        with self._room:
            return self._catalogue.forget(self._catalogue.entries(), self._remove)

    def usage(self) -> TierUsage:
        totals = self._catalogue.totals()
        return usage_of(self.capacity_bytes, self._reserved_bytes, totals, self._tally)

    def close(self) -> None:
        self._records.clear()
        self._catalogue.close()

    def _read(self, name: str, first: int, end: int) -> Bytes | None:
        record = self._records.get(name)
        if record is None:
            self._tally.add(misses=1)
            return None
        rows = record.data[first:end]
        self._tally.add(hits=1, read_bytes=rows.nbytes)
        return rows

    def _evict(self, entry: Entry) -> None:
        self._remove(entry)
        self._tally.add(evicted=1, evicted_bytes=entry.bytes)

    def _remove(self, entry: Entry) -> None:
        self._records.pop(entry.name, None)
