"""Both tiers against a naive model: what is found, what is read, what goes first, and never more than the capacity."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.memory.records import NAMESPACE, OTHER, chain, checkpoint, directory_bytes, payload, rows
from thalweg.memory.disk import DiskTier
from thalweg.memory.folder import OVERHEAD_BYTES
from thalweg.memory.host import HostTier
from thalweg.memory.record import Record, RecordKind
from thalweg.memory.tier import Tier

ROW = 150_000  # bytes: a few records fill the smallest disk
CAPACITY = 4 << 20
UNITS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def naive(records: dict[str, Record], digests: list[bytes]) -> tuple[int, tuple[int, ...]]:
    """The units that any choice of records covers, and the boundaries with checkpoints."""
    reach, before = 0, -1
    while reach > before:
        before = reach
        for record in records.values():
            own, first = record.head.digests, record.head.first_unit
            if record.head.kind is RecordKind.ROWS and first <= reach:
                same = 0
                while same < len(own) and first + same < len(digests) and own[same] == digests[first + same]:
                    same += 1
                reach = max(reach, first + same if same else 0)
    marks = {r.head.digests[0] for r in records.values() if r.head.kind is RecordKind.CHECKPOINT}
    return reach, tuple(n + 1 for n in range(reach) if digests[n] in marks)


class TierMachine(RuleBasedStateMachine):
    """Random writes, uses and reservations. The model forgets what the tier says that it evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Record] = {}
        self.prompts = [chain(0)]
        self.tier = self.make()

    def make(self) -> Tier:
        raise NotImplementedError

    def held(self) -> set[str]:
        return {entry.name for entry in self.catalogue().entries("durable")}

    def catalogue(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def keep(self, record: Record) -> None:
        before = self.held()
        written = self.tier.write(record)
        after = self.held()
        assert written == (record.head.name in after)
        if record.head.name not in self.records:
            self.records[record.head.name] = record
        gone = set(self.records) - after
        assert gone - {record.head.name} == before - after
        assert record.head.anchor not in {
            digest
            for name in before - after
            for digest in self.records[name].head.digests
            if self.records[name].head.kind is RecordKind.ROWS
        }, "what it hangs on was evicted for it"
        heads = [self.records.pop(name).head for name in gone]
        cut = {d for head in heads if head.name in before and head.kind is RecordKind.ROWS for d in head.digests}
        assert not any(r.head.anchor in cut for r in self.records.values()), "a chain was cut"

    @rule(units=UNITS, data=st.data())
    def write_rows(self, units: list[int], data: st.DataObject) -> None:
        digests = chain(*units)
        self.prompts.append(digests)
        first = data.draw(st.integers(0, len(units) - 1))
        self.keep(rows(digests, first, data.draw(st.integers(first + 1, len(units))), ROW))

    @rule(units=UNITS)
    def continue_rows(self, units: list[int]) -> None:
        digests = chain(*units)
        self.prompts.append(digests)
        found = self.tier.find(digests).units
        if found < len(digests):
            self.keep(rows(digests, found, len(digests), ROW))

    @rule(units=UNITS)
    def write_checkpoint(self, units: list[int]) -> None:
        self.keep(checkpoint(chain(*units), len(units) - 1, 2 * ROW))

    @rule(units=UNITS)
    def use(self, units: list[int]) -> None:
        digests = chain(*units)
        found = self.tier.find(digests)
        self.tier.touch(found)
        assert sum(piece.units for piece in found.pieces) == found.units
        at = 0
        for piece in found.pieces:
            assert piece.first_unit == at and piece.units > 0
            expected = payload(digests[at : at + piece.units], ROW)
            assert np.array_equal(self.tier.read_rows(piece), expected)
            at += piece.units
        for boundary in found.checkpoints:
            digest = digests[boundary - 1]
            assert np.array_equal(self.tier.read_checkpoint(digest), payload([digest], 2 * ROW)[0])

    @rule()
    def clear(self) -> None:
        size = sum(r.data.nbytes for r in self.records.values())
        assert self.tier.clear() >= size
        self.records.clear()

    @invariant()
    def finds_what_the_model_finds(self) -> None:
        for digests in self.prompts[-4:]:
            found = self.tier.find(digests)
            assert (found.units, found.checkpoints) == naive(self.records, digests)
        assert self.tier.find(chain(0, 1, namespace=OTHER)).units == 0

    @invariant()
    def stays_within_its_capacity(self) -> None:
        usage = self.tier.usage()
        assert usage.bytes <= usage.capacity_bytes
        assert usage.rows_records + usage.checkpoint_records == len(self.records)

    def teardown(self) -> None:
        self.tier.close()


class HostMachine(TierMachine):
    def make(self) -> HostTier:
        self.reserved = 0
        return HostTier(CAPACITY - OVERHEAD_BYTES)

    def catalogue(self):  # type: ignore[no-untyped-def]
        return self.tier._catalogue

    @rule(size=st.integers(0, CAPACITY))
    def reserve(self, size: int) -> None:
        assert self.tier.reserve(size) == (self.reserved + size <= self.tier.capacity_bytes)
        if self.reserved + size <= self.tier.capacity_bytes:
            self.reserved += size
        self.records = {name: self.records[name] for name in self.held()}

    @precondition(lambda self: self.reserved)
    @rule(share=st.floats(0, 1))
    def release(self, share: float) -> None:
        size = int(share * self.reserved)
        self.tier.release(size)
        self.reserved -= size


class DiskMachine(TierMachine):
    def make(self) -> DiskTier:
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        return DiskTier(self.directory, CAPACITY)

    def catalogue(self):  # type: ignore[no-untyped-def]
        return self.tier._folder.catalogue

    @rule()
    def reopen(self) -> None:
        self.tier.close()
        self.tier = DiskTier(self.directory, CAPACITY)

    @invariant()
    def files_are_what_the_catalogue_says(self) -> None:
        assert {path.name for path in self.directory.glob("*.kv")} == set(self.records)
        assert not list(self.directory.glob("*.tmp"))
        assert directory_bytes(self.directory) <= CAPACITY

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.directory)


QUICK = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestHostMachine = HostMachine.TestCase
TestHostMachine.settings = QUICK
TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = QUICK


@pytest.fixture(params=["host", "disk"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made = HostTier(64 << 20) if request.param == "host" else DiskTier(tmp_path / "cache", 64 << 20)
    yield made
    made.close()


def test_overlapping_records_reach_as_far_as_any_choice(tier: Tier) -> None:
    digests = chain(*range(12))
    for first, end in ((0, 6), (0, 4), (4, 10), (9, 12)):
        assert tier.write(rows(digests, first, end))
    assert [(p.first_unit, p.units) for p in tier.find(digests).pieces] == [(0, 4), (4, 5), (9, 3)]
    other = chain(*range(5), 99, 98)
    assert tier.find(other).units == 5
    assert tier.write(rows(other, 5, 7))
    assert [(p.first_unit, p.units) for p in tier.find(other).pieces] == [(0, 5), (5, 2)]


def test_records_are_counted(tier: Tier) -> None:
    digests = chain(1, 2, 3)
    assert tier.write(rows(digests, 0, 3)) and tier.write(rows(digests, 0, 3)) and tier.write(checkpoint(digests, 1))
    found = tier.find(digests)
    assert found.checkpoints == (2,)
    assert tier.read_rows(found.pieces[0]) is not None and tier.read_checkpoint(digests[1]) is not None
    assert tier.read_checkpoint(digests[0]) is None
    usage = tier.usage()
    assert (usage.rows_records, usage.checkpoint_records, usage.writes) == (1, 1, 2)
    assert (usage.hits, usage.misses, usage.read_bytes, usage.read_failures) == (2, 1, 3 * 64 + 96, 0)


def test_the_useful_outlives_the_recent(tier: Tier) -> None:
    """Many one-off prompts pass through; what is used between them stays."""
    digests = chain(1)
    assert tier.write(rows(digests, 0, 1, 2 << 20))
    for number in range(100):
        tier.touch(tier.find(digests))
        assert tier.write(rows(chain(2, number), 0, 2, 2 << 20))
    assert tier.find(digests).units == 1
    assert tier.usage().evicted > 50


def test_a_prompt_that_is_too_long_keeps_its_beginning(tier: Tier) -> None:
    digests = chain(*range(100))
    kept = 0
    while tier.write(rows(digests, kept, kept + 1, 1 << 20)):
        kept += 1
    assert tier.find(digests).units == kept > 55 and tier.usage().evicted == 0
    assert not tier.write(rows(chain(7), 0, 1, 100 << 20)), "larger than the tier"
    assert tier.find(digests).units == kept


def test_a_million_tokens_are_found_in_milliseconds(tier: Tier) -> None:
    digests = chain(*range(8192))
    for first in range(0, 8192, 32):
        assert tier.write(rows(digests, first, first + 32, 1))
    for unit in range(31, 8192, 512):
        assert tier.write(checkpoint(digests, unit, 1))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        found = tier.find(digests)
        seconds.append(time.perf_counter() - begin)
    assert found.units == 8192 and len(found.pieces) == 256 and len(found.checkpoints) == 16
    assert min(seconds) < 0.05
    assert tier.find(chain(*range(5000, 13192))).units == 0


def test_other_weights_are_known_to_the_disk_alone(tmp_path: Path) -> None:
    origin = b"t" * 16
    for tier, told in ((HostTier(1 << 20), False), (DiskTier(tmp_path, CAPACITY), True)):
        assert tier.write(rows(chain(1), 0, 1, origin=origin))
        assert tier.other_weights(origin, OTHER) is told
        assert not tier.other_weights(origin, NAMESPACE) and not tier.other_weights(bytes(16), OTHER)
        tier.close()


def test_two_threads_never_exceed_the_cap(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 8 << 20)
    errors: list[BaseException] = []
    most = 0

    def work(number: int) -> None:
        try:
            for step in range(60):
                digests = chain(number, *range(step % 4 + 1))
                tier.write(rows(digests, 0, len(digests), 90_000 + 1000 * step))
                tier.write(checkpoint(chain(number, step), 1, 1_000_000))
                found = tier.find(digests)
                tier.touch(found)
                for piece in found.pieces:
                    read = tier.read_rows(piece)
                    part = digests[piece.first_unit : piece.first_unit + piece.units]
                    assert read is None or np.array_equal(read, payload(part, read.shape[1]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, directory_bytes(tmp_path))
    for thread in threads:
        thread.join()
    assert not errors and (4 << 20) < most <= 8 << 20
    assert tier.usage().dropped == tier.usage().read_failures == 0
    tier.close()


def test_writers_and_reservations_share_the_host() -> None:
    tier, errors = HostTier(1 << 20), []

    def work(number: int) -> None:
        for step in range(200):
            tier.write(rows(chain(number, step), 0, 2, 20_000))
            if tier.reserve(300_000):
                tier.release(300_000)
            usage = tier.usage()
            if usage.bytes > usage.capacity_bytes:
                errors.append(usage)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and sum(r.data.nbytes for r in tier._records.values()) <= 1 << 20
