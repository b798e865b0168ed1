"""The disk tier when the disk fails, when the process dies, and when files are not what they were."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.memory.records import (
    Death,
    FailingFiles,
    abandon,
    chain,
    checkpoint,
    directory_bytes,
    payload,
    rows,
)
from thalweg.errors import ConfigError
from thalweg.memory.catalogue import LOG_BYTES, entry_of
from thalweg.memory.disk import DiskTier
from thalweg.memory.files import Files
from thalweg.memory.folder import CATALOGUE_NAME
from thalweg.memory.record import FORMAT_VERSION, Record, RecordKind

CAPACITY = 4 << 20
ROW = 300_000
ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: these tests open hundreds of tiers."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path / "cache"
        return
    path = Path("/dev/shm") / f"thalweg-test-{os.getpid()}-{time.monotonic_ns()}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def script() -> list[Record]:
    """More than the smallest disk holds: the last ones evict the first."""
    first, second = chain(1, 2, 3, 4, 5), chain(6, 7, 8, 9, 10)
    return [
        rows(first, 0, 2, ROW), checkpoint(first, 1, ROW), rows(first, 2, 5, ROW),
        rows(second, 0, 2, ROW), checkpoint(second, 1, ROW), rows(second, 2, 4, ROW),
    ]  # fmt: skip


def held(tier: DiskTier) -> set[str]:
    return {entry.name for entry in tier._folder.catalogue.entries("durable")}


def is_sound(tier: DiskTier, records: list[Record]) -> None:
    """Catalogue and files agree, everything held reads as it was written, and the cap holds."""
    by_name = {record.head.name: record for record in records}
    directory = tier._folder.directory
    names = held(tier)
    assert {path.name for path in directory.glob("*.kv")} == names <= set(by_name)
    assert len(tier._folder.catalogue.entries()) == len(names) and not list(directory.glob("*.tmp"))
    for name in names:
        head = by_name[name].head
        _, read = tier._folder.read(name, len(head.digests))
        assert np.array_equal(read, payload(list(head.digests), read.shape[1]))
    assert directory_bytes(directory) <= tier.capacity_bytes


def operations(directory: Path) -> int:
    """How many operations the script takes, from the opening on."""
    files = FailingFiles(1 << 60, Death())
    tier = DiskTier(directory, CAPACITY, files)
    for record in script():
        assert tier.write(record)
    for digests in (chain(1, 2, 3, 4, 5), chain(6, 7, 8, 9, 10)):
        for piece in tier.find(digests).pieces:
            assert tier.read_rows(piece) is not None
    tier.close()
    shutil.rmtree(directory)
    return files.count


@pytest.mark.parametrize("capacity", [CAPACITY, 3 * CAPACITY])
def test_death_at_every_operation(directory: Path, capacity: int) -> None:
    """With room for everything, and with evictions, in the middle of which a file goes before its entry."""
    count = operations(directory)
    assert count > 40
    for number in range(count):
        for late in (False, True):
            durable: list[str] = []
            tier = None
            with contextlib.suppress(Death):
                # An opening that dies holds no record yet; its lock goes with its descriptor.
                tier = DiskTier(directory, capacity, FailingFiles(number, Death(), late=late))
                for record in script():
                    if tier.write(record):
                        durable.append(record.head.name)
            if tier:
                abandon(tier)
            there = {path.name for path in directory.glob("*.kv")}
            after = DiskTier(directory, capacity)
            is_sound(after, script())
            assert set(durable) & there <= held(after), (number, late)
            assert capacity == CAPACITY or set(durable) <= there
            for record in script():
                after.write(record)
            is_sound(after, script())
            after.close()
            shutil.rmtree(directory)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_errors_at_every_operation(directory: Path, code: int) -> None:
    """From the n-th operation on, for ever or for three operations: nothing is raised, and the rest goes on."""
    count = operations(directory)
    for number in range(3, count):  # the first three belong to the opening
        for until in (number + 3, 1 << 60):
            files = FailingFiles(number, OSError(code, os.strerror(code)), until=until)
            tier = DiskTier(directory, CAPACITY, files)
            written = {record.head.name for record in script() if tier.write(record)}
            for digests in (chain(1, 2, 3, 4, 5), chain(6, 7, 8, 9, 10)):
                for piece in tier.find(digests).pieces:
                    tier.read_rows(piece)
            usage = tier.usage()
            assert usage.dropped + usage.read_failures + usage.misses > 0 or files.count <= number
            assert usage.writes == len(written) and directory_bytes(directory) <= CAPACITY
            tier.close()
            after = DiskTier(directory, CAPACITY)
            is_sound(after, script())
            after.close()
            shutil.rmtree(directory)


def test_errors_are_logged_once_per_kind(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = DiskTier(directory, CAPACITY, FailingFiles(6, OSError(errno.ENOSPC, "No space left on device")))
    for number in range(20):
        assert not tier.write(rows(chain(number), 0, 1))
    assert tier.usage().dropped == 20 and len(caplog.records) == 1
    tier.close()


def damages() -> dict[str, bytes | int | None]:
    """What may happen to a file: a byte of it flips, it is cut or longer, it vanishes, or is of another version."""
    flips = {"payload": 5000, "header": 70, "table": 100, "version": 8}
    return {**flips, "cut": -1, "empty": -2, "longer": -3, "gone": None}


@pytest.mark.parametrize("damage", damages())
@pytest.mark.parametrize("kind", RecordKind)
def test_damage_is_a_miss_and_is_deleted(
    directory: Path, damage: str, kind: RecordKind, caplog: pytest.LogCaptureFixture
) -> None:
    tier = DiskTier(directory, CAPACITY)
    digests = chain(1, 2)
    for record in (rows(digests, 0, 2, 3000), checkpoint(digests, 1, 3000)):
        assert tier.write(record)
    broken = rows(digests, 0, 2) if kind is RecordKind.ROWS else checkpoint(digests, 1)
    path = directory / broken.head.name
    content, at = bytearray(path.read_bytes()), damages()[damage]
    if at is None:
        path.unlink()
    elif damage in ("cut", "empty", "longer"):
        path.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"x"}[damage])
    else:
        content[at] ^= FORMAT_VERSION | 2
        path.write_bytes(content)
    piece = tier.find(digests).pieces[0]
    read = tier.read_rows(piece) if kind is RecordKind.ROWS else tier.read_checkpoint(digests[1])
    assert read is None and not path.exists() and broken.head.name not in held(tier)
    usage = tier.usage()
    assert usage.misses == 1 and usage.read_failures == len(caplog.records) == (damage != "gone")
    assert tier.write(rows(digests, 0, 2, 3000)) and tier.write(checkpoint(digests, 1, 3000))
    assert tier.read_rows(tier.find(digests).pieces[0]) is not None
    tier.close()


def test_a_file_under_another_name_is_not_taken_for_it(directory: Path) -> None:
    tier = DiskTier(directory, CAPACITY)
    one, two = rows(chain(1), 0, 1), rows(chain(2), 0, 1)
    assert tier.write(one) and tier.write(two)
    shutil.copy(directory / two.head.name, directory / one.head.name)
    assert tier.read_rows(tier.find(chain(1)).pieces[0]) is None
    assert tier.read_rows(tier.find(chain(2)).pieces[0]) is not None
    tier.close()


def test_uses_survive_a_restart(directory: Path) -> None:
    tier = DiskTier(directory, CAPACITY)
    assert tier.write(rows(chain(1), 0, 1, ROW))
    for _ in range(9):
        tier.touch(tier.find(chain(1)))
    tier.close()
    tier = DiskTier(directory, CAPACITY)
    assert tier._folder.catalogue.entries()[0].uses == 10
    for number in range(50):
        assert tier.write(rows(chain(2, number), 0, 1 + number % 2, ROW))
    assert tier.find(chain(1)).units == 1
    tier.close()


@pytest.mark.parametrize("damage", ["garbage", "middle", "truncated", "empty", "gone", "version", "tables"])
def test_a_damaged_catalogue_is_rebuilt(directory: Path, damage: str) -> None:
    tier = DiskTier(directory, CAPACITY)
    for record in script()[:3]:
        assert tier.write(record)
    tier.close()
    path = directory / CATALOGUE_NAME
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        path.write_bytes(os.urandom(len(content)))
    elif damage == "middle":
        content[4096:] = os.urandom(len(content) - 4096)
        path.write_bytes(content)
    elif damage in ("truncated", "empty"):
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    elif damage == "gone":
        path.unlink()
    else:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA user_version = 9" if damage == "version" else "DROP TABLE record")
            database.commit()
    tier = DiskTier(directory, CAPACITY)
    assert held(tier) == {record.head.name for record in script()[:3]}
    assert tier.find(chain(1, 2, 3, 4, 5)).units == 5 and tier.find(chain(1, 2)).checkpoints == (2,)
    is_sound(tier, script())
    tier.close()


@pytest.mark.parametrize("stays", [False, True])
def test_one_bad_file_does_not_cost_the_others(directory: Path, stays: bool) -> None:
    """Without a catalogue, one file cannot be read, or not even be deleted: the rest is taken in."""
    tier = DiskTier(directory, CAPACITY)
    for record in script()[:3]:
        assert tier.write(record)
    tier.close()
    (directory / CATALOGUE_NAME).unlink()
    bad = directory / script()[2].head.name

    class BadSector(Files):
        def open(self, path: Path) -> int:
            if path == bad:
                raise OSError(errno.EIO, "Input/output error")
            return super().open(path)

        def remove(self, path: Path) -> None:
            if path == bad and stays:
                raise OSError(errno.EIO, "Input/output error")
            super().remove(path)

    tier = DiskTier(directory, CAPACITY, BadSector())
    assert held(tier) == {record.head.name for record in script()[:2]}
    assert bad.exists() == stays
    assert tier.read_rows(tier.find(chain(1, 2, 3, 4, 5)).pieces[0]) is not None
    tier.close()


def test_a_smaller_cap_is_kept_from_the_start(directory: Path) -> None:
    tier = DiskTier(directory, 3 * CAPACITY)
    digests = chain(*range(30))
    records = [rows(digests, n, n + 1, ROW) for n in range(30)]
    assert all(tier.write(record) for record in records)
    tier.close()
    tier = DiskTier(directory, CAPACITY)
    is_sound(tier, records)
    found = tier.find(digests).units
    assert found == len(held(tier)) > 5, "the end of the prompt went, not its beginning"
    tier.close()


def test_the_catalogue_of_a_far_larger_cache_shrinks_with_the_cap(directory: Path) -> None:
    tier = DiskTier(directory, 1 << 30)
    heads = [rows(chain(number, *range(200)), 0, 200, 1).head for number in range(1500)]
    tier._folder.catalogue.add([entry_of(head, 4096, 0.0, durable=True) for head in heads])
    tier.close()
    assert directory_bytes(directory) > CAPACITY
    tier = DiskTier(directory, CAPACITY)
    assert directory_bytes(directory) <= CAPACITY and held(tier) == set()
    assert tier.write(rows(chain(1), 0, 1, ROW)), "there is room again"
    is_sound(tier, [rows(chain(1), 0, 1, ROW)])
    tier.close()


def test_a_long_reader_cannot_make_the_log_grow(directory: Path) -> None:
    tier = DiskTier(directory, 16 << 20)
    assert tier.write(rows(chain(0), 0, 1))
    reader = sqlite3.connect(directory / CATALOGUE_NAME, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM record").fetchone()
    tier._folder.catalogue._write.execute("PRAGMA busy_timeout = 1")
    most, dropped = 0, 0
    for number in range(400):
        dropped += not tier.write(rows(chain(number, 1), 0, 2))
        most = max(most, (directory / f"{CATALOGUE_NAME}-wal").stat().st_size)
    assert dropped and most <= LOG_BYTES
    reader.close()
    assert tier.write(rows(chain(1, 2, 3), 0, 3))
    tier.close()


def test_start_up_refusals(directory: Path, tmp_path: Path) -> None:
    tier = DiskTier(directory, CAPACITY)
    with pytest.raises(ConfigError, match=f"kv_disk_dir: .* process {os.getpid()}") as error:
        DiskTier(directory, CAPACITY)
    assert error.value.param == "kv_disk_dir"
    code = "import sys, pathlib; from thalweg.memory.disk import DiskTier; DiskTier(pathlib.Path(sys.argv[1]), 1 << 23)"
    command = [sys.executable, "-c", code, str(directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode and f"process {os.getpid()}" in result.stderr
    tier.close()
    tier.close()
    DiskTier(directory, CAPACITY).close()
    with pytest.raises(ConfigError, match="kv_disk_space") as error:
        DiskTier(directory, 1000)
    assert error.value.param == "kv_disk_space"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="kv_disk_dir"):
        DiskTier(tmp_path / "file" / "cache", CAPACITY)
    with pytest.raises(ConfigError, match="Read-only"):
        DiskTier(tmp_path / "b", CAPACITY, FailingFiles(0, OSError(errno.EROFS, "Read-only file system")))


def test_only_the_owner_may_read(directory: Path) -> None:
    tier = DiskTier(directory, CAPACITY)
    assert tier.write(rows(chain(1), 0, 1))
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    tier.close()


def test_a_full_disk(tmp_path: Path) -> None:
    """A real file system of 6 MiB under a cap of 64 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        tier = DiskTier(tmp_path / "cache", 64 << 20)
        records = [rows(chain(number), 0, 1, 700_000) for number in range(20)]
        written = [tier.write(record) for record in records]
        assert 3 < sum(written) < 9 and tier.usage().dropped == 20 - sum(written)
        tier.close()
        tier = DiskTier(tmp_path / "cache", CAPACITY)
        is_sound(tier, records)
        assert tier.write(rows(chain(99), 0, 1, 700_000)), "a cap that fits the disk works again"
        tier.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


WRITER = """
import sys
from pathlib import Path
from tests.memory.records import chain, checkpoint, rows
from thalweg.memory.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), 1 << 30)
print("open", flush=True)
for number in range(10**6):
    digests = chain(int(sys.argv[2]), number, 1, 2)
    for record in (rows(digests, 0, 4, 9_000), checkpoint(digests, 3, 20_000)):
        if tier.write(record):
            print(record.head.name, flush=True)
    tier.touch(tier.find(digests))
"""


def kill_at_random(directory: Path, trials: int, seed: int) -> None:
    """Kill a writing process again and again; everything that it called durable must be there and sound."""
    chance, durable = random.Random(seed), set()
    for trial in range(trials):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory), str(trial)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        durable |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        process.stdout.close()
        tier = DiskTier(directory, 1 << 30)
        assert durable <= held(tier)
        for entry in tier._folder.catalogue.entries("durable"):
            if trial == trials - 1 or entry.name in durable:
                tier._folder.read(entry.name, entry.units)
        assert not list(directory.glob("*.tmp"))
        assert {path.name for path in directory.glob("*.kv")} == held(tier)
        tier.close()
        if len(durable) > 2000:
            shutil.rmtree(directory)
            durable = set()
    assert durable or trials > 10


def test_kill_minus_nine(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "cache", 6, 1)


@pytest.mark.stress
@pytest.mark.timeout(1200)
def test_kill_minus_nine_two_hundred_times(tmp_path: Path) -> None:
    kill_at_random(tmp_path / "cache", 200, 2)


COMPANION = """
import sys
from pathlib import Path
from tests.memory.records import chain, rows
from thalweg.memory.folder import open_folder
folder = open_folder(Path(sys.argv[1]))
for number in range(80):
    folder.write(rows(chain(7, number), 0, 2, 250_000), lambda entry: None)
    if number % 20 == 10:
        folder.forget(folder.catalogue.entries("durable")[:5])
        folder.reconcile(alone=False)
"""


def test_two_processes_share_one_cap(directory: Path) -> None:
    """A server writes while commands import, delete and collect beside it."""
    tier, most, own = DiskTier(directory, 2 * CAPACITY), 0, []
    with subprocess.Popen([sys.executable, "-c", COMPANION, str(directory)], cwd=ROOT) as process:
        for number in range(10**6):
            own.append(rows(chain(8, number), 0, 2, 200_000))
            tier.write(own[-1])
            for piece in tier.find(chain(8, number // 2)).pieces:
                tier.read_rows(piece)
            most = max(most, directory_bytes(directory))
            if process.poll() is not None:
                break
    assert process.returncode == 0 and CAPACITY < most <= 2 * CAPACITY and tier.usage().read_failures == 0
    is_sound(tier, own[-100:] + [rows(chain(7, number), 0, 2, 250_000) for number in range(80)])
    tier.close()


def test_a_file_that_goes_while_a_directory_is_listed_is_not_in_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "stays").write_bytes(b"1")
    (directory / "goes").write_bytes(b"22")
    scandir = os.scandir

    @contextlib.contextmanager
    def others_delete(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        (path / "goes").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", others_delete)
    assert {name: state.st_size for name, state in Files().listing(directory).items()} == {"stays": 1}
