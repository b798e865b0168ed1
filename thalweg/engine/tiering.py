"""What moves between the pools and the lower tiers, and when. Decides; a Mover copies in the background. No torch.

Down: finished units and checkpoints are copied to the host and disk tiers while they are still in the pools, so that
evicting them later costs nothing. What is under way is bounded; what does not get its turn before it is evicted is
counted as missed, and nobody waits for it.

Up: before a request is admitted, the tiers are asked for more of its prompt than the pools have. If that saves at least
a unit of work its rows are loaded while others run, published in the prefix index, and found there by the admission.

Sideways: a running request that must give way takes its blocks to host memory and comes back with them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from thalweg.cache.coordinator import Coordinator, Held
from thalweg.cache.geometry import Group
from thalweg.cache.policy import CheckpointReason, WindowPolicy
from thalweg.cache.prefix_index import Match, Namespace, UnitNode, unit_digest
from thalweg.cache.sequence import SequenceCache, Snapshot
from thalweg.engine.request import LoadOutcome, Running, Sequence, Swapped
from thalweg.memory.host import HostTier
from thalweg.memory.jobs import LoadJob, LoadPart, LoadResult, Mover, StoreJob
from thalweg.memory.record import RecordHead, RecordKind
from thalweg.memory.tier import Found, Tier, TierUsage
from thalweg.types import CacheReport, MissReason

_log = logging.getLogger("thalweg.engine")
HOST, DISK = "host", "disk"
RECORD_UNITS = 32  # units of one record of rows, at least: 4,096 tokens, 14 MiB for Flash in the served format
MOST_RECORD_UNITS = 256  # where rows are small, up to RECORD_BYTES: opening files would take longer than reading them
RECORD_BYTES = 8 * 2**20
PART_BYTES = 2**20  # read, checked and put in place at once: while it is still in the processor's cache
STORES_IN_FLIGHT_BYTES = 256 * 2**20
# What a tier refused is offered again with a later request: often enough for a disk that has room again, seldom enough
# for one that never will, since every time its rows are copied out of the pools for it.
REFUSED_SECONDS = 60.0
_MOST_BACKLOG = 4096  # units that wait for their copy
_NO_ORIGIN = bytes(16)
_NOTHING = Found((), 0, ())
Answer = TypeVar("Answer")


@dataclass(slots=True)
class Loading:
    """A request whose rows are on their way. Its cache holds the blocks that they go to."""

    sequence: Sequence
    cache: SequenceCache
    first_unit: int = 0
    job: LoadJob | None = None
    found: Mapping[str, Found] = field(default_factory=dict)
    comes_back: bool = False  # with its own blocks, after it gave way
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is worth loading: rows up to `units` from pieces of the tiers, and a checkpoint of a tier or None."""

    units: int
    sources: tuple[tuple[str, int, int], ...]  # tier, number of its piece, first unit
    checkpoint: str | None


class Tiering:
    """Owned by the engine thread. `post` runs an action on that thread; the engine gives it before it starts."""

    def __init__(
        self,
        coordinator: Coordinator,
        tiers: Mapping[str, Tier],
        mover: Mover | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.coordinator = coordinator
        self.counters: defaultdict[str, float] = defaultdict(float)
        self._clock = clock
        self._tiers = tiers
        host = tiers.get(HOST)
        self._host = host if isinstance(host, HostTier) else None
        self._mover = mover
        unit_bytes = 0 if mover is None else _unit_bytes(coordinator, mover)
        self._record_units = max(RECORD_UNITS, min(MOST_RECORD_UNITS, RECORD_BYTES // max(1, unit_bytes)))
        self._part_units = max(1, PART_BYTES // max(1, unit_bytes))
        self._post: Callable[[Callable[[], None]], None] = lambda action: action()
        self._backlog: deque[UnitNode] = deque()
        self._refused: deque[tuple[float, RecordKind, SequenceOf[UnitNode]]] = deque(maxlen=_MOST_BACKLOG)
        self._storing: dict[int, tuple[StoreJob, Held]] = {}  # blocks still held, oldest first
        self._serial = 0
        self._in_flight_bytes = 0
        self.loads_in_flight = 0

    def connect(self, post: Callable[[Callable[[], None]], None]) -> None:
        """Where finished copies report."""
        self._post = post

    @property
    def busy(self) -> bool:
        """Whether a copy is under way that will free blocks or bring a request back."""
        return bool(self._storing or self.loads_in_flight)

    @property
    def tiers(self) -> Mapping[str, Tier]:
        return self._tiers

    def usages(self) -> dict[str, TierUsage]:
        """What each tier holds and did, by any thread; without one that cannot say."""
        asked = {name: _asked(tier.usage, None) for name, tier in self._tiers.items()}
        return {name: usage for name, usage in asked.items() if usage is not None}

    def close(self) -> None:
        """Write what is under way, then let the tiers go."""
        if self._mover is not None:
            self._mover.close()
        for tier in self._tiers.values():
            _asked(tier.close, None)

    def abandon(self) -> None:
        """Nobody trusts this state any more: wait until no copy touches the pools, and begin none. Records in host
        memory, which have no checksums, go; the tiers stay open."""
        if self._mover is not None:
            self._mover.abandon()
        if self._host is not None:
            _asked(self._host.clear, 0)

    def reset(self, tiers: frozenset[str] | None) -> int:
        """Forget what these tiers hold, all of them if None; returns the tokens that the device forgot."""
        forgotten = self.coordinator.reset() if tiers is None or "device" in tiers else 0
        for name, tier in self._tiers.items():
            if tiers is None or name in tiers:
                _asked(tier.clear, 0)
        if tiers is None or not tiers.isdisjoint(self._tiers):
            for node in self.coordinator.index.units():  # what the device keeps is to be stored anew
                node.stored = node.checkpoint_stored = False
        return forgotten

    # -- down -------------------------------------------------------------------------------------------------

    def offer(self, cache: SequenceCache) -> None:
        """After a step: see what a running request has finished."""
        if not self._tiers or cache.node is None:
            return
        if cache.node.depth - max(cache.offered_units, cache.stored_units) >= self._record_units:
            cache.offered_units = cache.node.depth
            self._backlog.append(cache.node)

    def offer_end(self, node: UnitNode | None) -> None:
        """The unit that an ended request stood on."""
        if self._tiers and node is not None and node.alive:
            self._backlog.append(node)

    def pump(self) -> None:
        """Begin as many copies as may be under way."""
        while self._refused and self._refused[0][0] <= self._clock():
            _, kind, nodes = self._refused.popleft()
            self._forget_stored(kind, nodes)
        fresh = self.coordinator.fresh_checkpoints
        while fresh:
            node = fresh.popleft()
            if self._tiers and self._worth_storing(node):
                self._backlog.append(node)
        while len(self._backlog) > _MOST_BACKLOG:
            self._backlog.popleft()
            self.counters["missed_stores"] += 1
        while self._backlog and self._in_flight_bytes < STORES_IN_FLIGHT_BYTES:
            node = self._backlog.popleft()
            if node.alive:
                self._store(node)
            else:
                self.counters["missed_stores"] += 1

    def _store(self, node: UnitNode) -> None:
        """Store rows up to a unit that no tier has, and its checkpoint; the rest of a long stretch waits its turn."""
        chain: list[UnitNode] = []
        above: UnitNode | None = node
        while above is not None and above.parent is not None and not above.stored:
            chain.append(above)
            above = above.parent
        chain.reverse()
        first = chain[: self._record_units]
        if first:
            self._begin_store(RecordKind.ROWS, first)
        if len(chain) > self._record_units:
            self._backlog.appendleft(node)
        elif node.checkpoint is not None and not node.checkpoint_stored and self._worth_storing(node):
            self._begin_store(RecordKind.CHECKPOINT, [node])

    def _worth_storing(self, node: UnitNode) -> bool:
        """Interval checkpoints of the boundary policy stay on the device: below, exact replay does their work, and they
        would be most of the bytes."""
        boundary = self.coordinator.policy.kind is WindowPolicy.BOUNDARY
        return node.reason is not CheckpointReason.LOADED and not (
            boundary and node.reason is CheckpointReason.INTERVAL
        )

    def _begin_store(self, kind: RecordKind, nodes: SequenceOf[UnitNode]) -> None:
        assert self._mover is not None, "tiers without a mover"
        rows = kind is RecordKind.ROWS
        held = self.coordinator.hold_rows(nodes) if rows else self.coordinator.hold_checkpoint(nodes[0])
        blocks = _by_group(nodes) if rows else {g: tuple(ids) for g, ids in (nodes[0].checkpoint or {}).items()}
        job = StoreJob(self._head(kind, nodes), blocks, tuple(self._tiers))
        size = sum(self._mover.block_bytes(group) * len(ids) for group, ids in blocks.items())
        self._serial += 1
        serial = self._serial
        self._storing[serial] = job, held
        self._in_flight_bytes += size
        for node in nodes:
            node.stored, node.checkpoint_stored = node.stored or rows, node.checkpoint_stored or not rows
        self._mover.store(job, lambda kept: self._post(lambda: self._stored(serial, kind, nodes, size, kept)))

    def _head(self, kind: RecordKind, nodes: SequenceOf[UnitNode]) -> RecordHead:
        first, policy = nodes[0], self.coordinator.policy
        assert first.parent is not None, "a root has no rows"
        checkpoint = kind is RecordKind.CHECKPOINT
        saved = self.coordinator.saved_tokens(first) if checkpoint else len(nodes) * policy.unit_tokens
        return RecordHead(
            kind=kind,
            namespace=unit_digest(b"", first.namespace.own),
            parent=first.parent.digest,
            first_unit=first.depth - 1,
            digests=tuple(node.digest for node in nodes),
            origin=unit_digest(first.namespace.content, first.key) if first.depth == 1 else _NO_ORIGIN,
            saved_tokens=saved,
            unit_tokens=policy.unit_tokens,
        )

    def _stored(
        self, serial: int, kind: RecordKind, nodes: SequenceOf[UnitNode], size: int, kept: SequenceOf[bool]
    ) -> None:
        self._release(serial)
        self._in_flight_bytes -= size
        self.counters["stores" if any(kept) else "failed_stores"] += 1
        if not all(kept):
            self._refused.append((self._clock() + REFUSED_SECONDS, kind, nodes))

    def _forget_stored(self, kind: RecordKind, nodes: SequenceOf[UnitNode]) -> None:
        rows = kind is RecordKind.ROWS
        for node in nodes:
            node.stored, node.checkpoint_stored = node.stored and not rows, node.checkpoint_stored and rows

    def _release(self, serial: int) -> None:
        _, held = self._storing.pop(serial, (None, ()))
        self.coordinator.unhold(held)

    def free_blocks(self) -> bool:
        """Wait until the oldest copy out of the pools has its bytes, and release its blocks. False if there is none."""
        if not self._storing:
            return False
        serial = next(iter(self._storing))
        self._storing[serial][0].gathered.wait()
        self._release(serial)
        return True

    # -- up ---------------------------------------------------------------------------------------------------

    def begin(self, sequence: Sequence, namespace: Namespace, ready: Callable[[Loading], None]) -> Loading | None:
        """Begin to load more of a waiting request's prompt, if that is worth it; `ready` is called when it is over."""
        if not self._tiers or sequence.load is not None or not self.coordinator.prefix_caching:
            return None
        limit = self.coordinator.reusable_units(len(sequence))
        match = self.coordinator.probe(sequence.tokens, namespace)
        if match.resume == limit or not self.coordinator.fits(match, len(sequence)):
            return None
        digests = self.coordinator.index.digests(namespace, sequence.tokens, limit)
        found = {name: _asked(partial(_find, tier, digests), _NOTHING) for name, tier in self._tiers.items()}
        sequence.load = LoadOutcome(stored_units=max(f.units for f in found.values()))
        plan = self._plan(match, found)
        if plan is None:
            if not match.path and not any(f.units for f in found.values()):
                self._note_other_weights(sequence, namespace)
            return None
        cache = self._blocks_for(sequence, namespace, plan)
        if cache is None:
            sequence.load = None  # if it must wait for room to run, too, it is asked again
            return None
        job = self._load_job(plan, found, cache, digests)
        loading = Loading(sequence, cache, min(len(match.path), plan.units), job, found)
        self.loads_in_flight += 1
        assert self._mover is not None, "tiers without a mover"
        began = self._clock()

        def done(result: LoadResult) -> None:
            seconds = self._clock() - began
            self._post(lambda: self._loaded(loading, result, seconds, ready))

        self._mover.load(job, done)
        return loading

    def _blocks_for(self, sequence: Sequence, namespace: Namespace, plan: _Plan) -> SequenceCache | None:
        """Blocks to load into, if need be those that copies out of the pools still hold."""
        while True:
            checkpoint = plan.checkpoint is not None
            cache = self.coordinator.begin_load(sequence.tokens, namespace, plan.units, checkpoint=checkpoint)
            if cache is not None or not self.free_blocks():
                return cache

    def _note_other_weights(self, sequence: Sequence, namespace: Namespace) -> None:
        own = unit_digest(b"", namespace.own)
        origin = self.coordinator.index.content_digest(namespace, sequence.tokens)
        if any(_asked(partial(tier.other_weights, origin, own), False) for tier in self._tiers.values()):
            sequence.load = LoadOutcome(other_weights=True)

    def _plan(self, match: Match, found: Mapping[str, Found]) -> _Plan | None:
        """The cheapest start that the tiers allow, or None where the pools alone save as much."""
        policy = self.coordinator.policy
        known = len(match.path)
        total = max(known, *(f.units for f in found.values()))
        kept = {c: name for name, f in reversed(tuple(found.items())) for c in f.checkpoints if c <= total}
        now = policy.resume(known, match.resume)
        then = policy.resume(total, max([match.resume, *kept]))
        if then.start - now.start < policy.unit_tokens:
            return None
        needed = not then.replayed and then.units != match.resume
        return _Plan(then.units, tuple(_sources(found, known, then.units)), kept[then.units] if needed else None)

    def _load_job(
        self, plan: _Plan, found: Mapping[str, Found], cache: SequenceCache, digests: SequenceOf[bytes]
    ) -> LoadJob:
        parts = []
        for tier, number, first in plan.sources:
            piece = found[tier].pieces[number]
            last = min(plan.units, piece.first_unit + piece.units)
            for begin in range(first, last, self._part_units):
                end = min(begin + self._part_units, last)
                part = replace(piece, units=end - piece.first_unit, digest=digests[end - 1])
                blocks = {g: [table[n] for n in range(begin, end)] for g, table in cache.growing.items()}
                parts.append(LoadPart(tier, part, begin - piece.first_unit, blocks))
        if plan.checkpoint is None:
            return LoadJob(tuple(parts))
        state = {g: [table[n] for n in sorted(table.numbers())] for g, table in cache.sliding.items()}
        return LoadJob(tuple(parts), (plan.checkpoint, digests[plan.units - 1], state))

    def _loaded(self, loading: Loading, result: LoadResult, seconds: float, ready: Callable[[Loading], None]) -> None:
        self.loads_in_flight -= 1
        self.counters["load_seconds"] += seconds
        job = loading.job
        assert job is not None, "loaded nothing"
        arrived = job.parts[: result.parts]
        units = loading.first_unit + sum(part.units for part in arrived)
        whole = len(arrived) == len(job.parts)
        checkpoint = whole and result.checkpoint
        self.coordinator.finish_load(loading.cache, loading.sequence.tokens, units, checkpoint=checkpoint)
        failed = not whole or (job.checkpoint is not None and not checkpoint)
        by_tier = tuple((part.tier, part.units) for part in arrived)
        stored = units if failed else max(f.units for f in loading.found.values())
        loading.sequence.load = LoadOutcome(loading.first_unit, by_tier, stored, failed=failed)
        self.counters["failed_loads" if failed else "loads"] += 1
        self.counters["loaded_units"] += units - loading.first_unit
        for name, found in loading.found.items():
            _asked(partial(self._tiers[name].touch, found), None)
        ready(loading)

    def report(self, sequence: Sequence, report: CacheReport) -> CacheReport:
        """A report with the tokens that were loaded for this request credited to their tiers."""
        load = sequence.load
        if load is None:
            return report
        unit = self.coordinator.policy.unit_tokens
        credit = Counter[str]()
        begin = load.first_unit
        for tier, units in load.by_tier:
            end = min(begin + units, report.cached_tokens // unit)
            credit[tier] += max(0, end - begin) * unit
            begin += units
        reason = report.reason
        if load.failed and reason is not MissReason.NONE:
            reason = MissReason.LOAD_FAILED
        elif load.other_weights and reason in (MissReason.COLD, MissReason.DIVERGED):
            reason = MissReason.WEIGHTS
        device = report.device_tokens - credit.total()
        return replace(report, device_tokens=device, host_tokens=credit[HOST], disk_tokens=credit[DISK], reason=reason)

    # -- sideways ---------------------------------------------------------------------------------------------

    def take_out(self, running: Running) -> bool:
        """Copy a running request's blocks to host memory, so that it can come back. False if there is no room there."""
        if self._host is None or self._mover is None:
            return False
        snapshot = running.cache.snapshot()
        size = sum(self._mover.block_bytes(group) * len(ids) for group, ids in snapshot.blocks.items())
        if not _asked(partial(self._host.reserve, size), False):
            self.counters["swaps_without_room"] += 1
            return False
        data = _asked(partial(self._mover.take_out, snapshot.blocks), None)
        if data is None:
            _asked(partial(self._host.release, size), None)
            self.counters["failed_swaps"] += 1
            return False
        running.sequence.swapped = Swapped(snapshot, data, size)
        self.counters["swapped_out"] += 1
        return True

    def bring_back(self, sequence: Sequence, namespace: Namespace, ready: Callable[[Loading], None]) -> Loading | None:
        """Begin to copy a request's blocks back. None if the pools have no room for them yet."""
        swapped = sequence.swapped
        assert swapped is not None and self._mover is not None, "nothing to bring back"
        saved = swapped.snapshot
        cache = self.coordinator.restore(sequence.tokens, namespace, saved)
        if cache is None:
            return None
        shared = cache.rows_from // self.coordinator.policy.unit_tokens
        blocks, data = {}, {}
        for group, rows in swapped.data.items():
            numbers = saved.numbers[group]
            growing = group in cache.growing
            places = [i for i, number in enumerate(numbers) if not growing or number >= shared]
            table = cache.growing[group] if growing else cache.sliding[group]
            blocks[group] = [table[numbers[i]] for i in places]
            data[group] = rows[places]
        loading = Loading(sequence, cache, comes_back=True)
        self.loads_in_flight += 1
        self._mover.put_back(data, blocks, lambda ok: self._post(lambda: self._back(loading, saved, ok, ready)))
        return loading

    def _back(self, loading: Loading, saved: Snapshot, filled: bool, ready: Callable[[Loading], None]) -> None:
        self.loads_in_flight -= 1
        sequence = loading.sequence
        self.coordinator.finish_restore(loading.cache, sequence.tokens, saved, filled=filled)
        self.forget(sequence)
        loading.comes_back = filled
        self.counters["swapped_in" if filled else "failed_swaps"] += 1
        ready(loading)

    def forget(self, sequence: Sequence) -> None:
        """Let go of what a request took to host memory."""
        swapped, sequence.swapped = sequence.swapped, None
        if swapped is not None and self._host is not None:
            _asked(partial(self._host.release, swapped.size_bytes), None)


def _unit_bytes(coordinator: Coordinator, mover: Mover) -> int:
    return sum(mover.block_bytes(spec.group) for spec in coordinator.groups if spec.compressed)


def _asked(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    """A tier's answer. One that cannot give it has nothing: no request fails for the sake of a cache."""
    try:
        return question()
    except Exception:
        _log.exception("a tier failed")
        return otherwise


def _find(tier: Tier, digests: SequenceOf[bytes]) -> Found:
    """What a tier has of a prompt. Raises ValueError for pieces that do not follow each other or are of other tokens:
    their rows would be put where they do not belong."""
    found, end = tier.find(digests), 0
    for piece in found.pieces:
        begin, end = end, end + piece.units
        if piece.first_unit != begin or not begin < end <= len(digests) or piece.digest != digests[end - 1]:
            raise ValueError(f"{piece} is not of this prompt")
    if found.units != end or any(not 0 < boundary <= end for boundary in found.checkpoints):
        raise ValueError(f"{found} does not agree with its own pieces")
    return found


def _sources(found: Mapping[str, Found], known: int, units: int) -> Iterator[tuple[str, int, int]]:
    """Pieces that cover the units [known, units), of the first tier as far as it goes, then of the next."""
    begin = known
    for tier, stored in found.items():
        for number, piece in enumerate(stored.pieces):
            end = min(piece.first_unit + piece.units, units)
            if piece.first_unit <= begin < end:
                yield tier, number, begin
                begin = end


def _by_group(nodes: SequenceOf[UnitNode]) -> dict[Group, tuple[int, ...]]:
    return {group: tuple(node.blocks[group] for node in nodes) for group in nodes[0].blocks}
