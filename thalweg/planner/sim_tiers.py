"""Lower tiers on a virtual clock: the real records and catalogue without their bytes, behind links of some bandwidth.

What a tier keeps, finds and evicts is the engine's own HostTier; a disk is one more of them. Copies take their turn in
one queue per tier and direction, so that a load waits for the loads before it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.memory.capacity import checkpoint_bytes, unit_bytes
from thalweg.memory.host import HostTier
from thalweg.memory.jobs import Blocks, LoadJob, LoadResult, StoreJob
from thalweg.memory.layout import CacheLayout
from thalweg.memory.record import Bytes, Record, RecordKind
from thalweg.memory.tier import Tier


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier below the device. Rates are bytes per second; `latency` is before every read, in seconds."""

    name: str  # `host` or `disk`
    capacity_bytes: int
    read_rate: float
    write_rate: float
    latency: float = 0.0


class VirtualClock:
    """Seconds since the simulation began."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Agenda:
    """What happens when, in order of time and then of arrival."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def add(self, seconds: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._entries, (seconds, self._serial, action))

    @property
    def next_seconds(self) -> float | None:
        return self._entries[0][0] if self._entries else None

    def take_due(self, now: float) -> Callable[[], None] | None:
        """The next action that is due."""
        return heapq.heappop(self._entries)[2] if self._entries and self._entries[0][0] <= now else None


class _Link:
    """One direction of a tier: jobs one after the other."""

    def __init__(self, rate: float, latency: float) -> None:
        self._rate, self._latency = rate, latency
        self._free_at = 0.0

    def done_at(self, now: float, size_bytes: int) -> float:
        self._free_at = max(now, self._free_at) + self._latency + size_bytes / self._rate
        return self._free_at


class VirtualMover:
    """A Mover whose copies are entries of an agenda. Copying out of the pools is taken to be as fast as the link of the
    host; who gives way to others stalls the step for it, as in the engine."""

    def __init__(
        self,
        clock: VirtualClock,
        agenda: Agenda,
        groups: tuple[CacheGroupSpec, ...],
        layout: CacheLayout,
        specs: Sequence[TierSpec],
    ) -> None:
        self._clock, self._agenda = clock, agenda
        self._block_bytes = {spec.group: layout.block_bytes(spec) for spec in groups}
        self._unit_bytes = max(1, unit_bytes(groups, layout))
        self._checkpoint_bytes = max(1, checkpoint_bytes(groups, layout))
        self.tiers: dict[str, Tier] = {spec.name: HostTier(spec.capacity_bytes, clock) for spec in specs}
        self._reads = {spec.name: _Link(spec.read_rate, spec.latency) for spec in specs}
        self._writes = {spec.name: _Link(spec.write_rate, 0.0) for spec in specs}
        self._nothing = np.empty(0, np.uint8)
        self._stall = 0.0

    def take_stall(self) -> float:
        """Seconds that the engine waited for copies since it was last asked."""
        seconds, self._stall = self._stall, 0.0
        return seconds

    def store(self, job: StoreJob, done: Callable[[Sequence[bool]], None]) -> None:
        job.gathered.set()
        rows = job.head.kind is RecordKind.ROWS
        shape = (len(job.head.digests), self._unit_bytes) if rows else (1, self._checkpoint_bytes)
        record = Record(job.head, self._hollow(shape))
        size = record.data.nbytes
        ready = max(self._writes[name].done_at(self._clock.seconds, size) for name in job.tiers)
        self._agenda.add(ready, lambda: done([self.tiers[name].write(record) for name in job.tiers]))

    def _hollow(self, shape: tuple[int, int]) -> Bytes:
        """An array of that shape that nobody has written to: all share one stretch of untouched memory."""
        size = shape[0] * shape[1]
        if len(self._nothing) < size:
            self._nothing = np.empty(size, np.uint8)
        return self._nothing[:size].reshape(shape)

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        now, ready = self._clock.seconds, self._clock.seconds
        for part in job.parts:
            ready = max(ready, self._reads[part.tier].done_at(now, part.units * self._unit_bytes))
        if job.checkpoint is not None:
            ready = max(ready, self._reads[job.checkpoint[0]].done_at(now, self._checkpoint_bytes))
        self._agenda.add(ready, lambda: done(self._arrived(job)))

    def _arrived(self, job: LoadJob) -> LoadResult:
        """What was still there when its turn came."""
        parts = 0
        for part in job.parts:
            if self.tiers[part.tier].read_rows(part.piece, part.skip) is None:
                break
            parts += 1
        found = job.checkpoint is not None and self.tiers[job.checkpoint[0]].read_checkpoint(job.checkpoint[1])
        return LoadResult(parts, found is not None and found is not False)

    def take_out(self, blocks: Blocks) -> Mapping[Group, Bytes]:
        now = self._clock.seconds
        self._stall += self._writes["host"].done_at(now, self._size(blocks)) - now
        return {group: np.empty((len(ids), 0), np.uint8) for group, ids in blocks.items()}

    def put_back(self, data: Mapping[Group, Bytes], blocks: Blocks, done: Callable[[bool], None]) -> None:
        self._agenda.add(self._reads["host"].done_at(self._clock.seconds, self._size(blocks)), lambda: done(True))

    def _size(self, blocks: Blocks) -> int:
        return sum(self._block_bytes[group] * len(ids) for group, ids in blocks.items())

    def block_bytes(self, group: Group) -> int:
        return self._block_bytes[group]

    def close(self) -> None:
        """Nothing is under way outside the agenda."""

    def abandon(self) -> None:
        """Nothing is under way outside the agenda."""
