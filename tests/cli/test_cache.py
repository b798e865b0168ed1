"""`thalweg cache` through the real command line, while a server holds the directory and while none does."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.cli.commands import run, run_alone
from tests.memory.records import chain, checkpoint, rows
from thalweg.cli.main import main
from thalweg.memory.catalogue import Catalogue
from thalweg.memory.disk import DiskTier
from thalweg.memory.folder import CATALOGUE_NAME

CAPACITY = 8 << 20
DIGESTS = chain(*range(6))
RECORDS = [
    rows(DIGESTS, 0, 4, 5000),
    rows(DIGESTS, 4, 6, 5000),
    checkpoint(DIGESTS, 3, 9000),
    checkpoint(DIGESTS, 5, 9),
]
OTHER = b"x" * 16
ELSEWHERE = rows(chain(1, namespace=OTHER), 0, 1, 700, namespace=OTHER)
SERVER = """
import sys
from pathlib import Path
from thalweg.memory.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), int(sys.argv[2]))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["alone", "beside a server"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A cache of five records, used by nobody or open in another process."""
    path = tmp_path / "cache"
    fill(path)
    if request.param == "alone":
        yield path
        return
    command = [sys.executable, "-c", SERVER, str(path), str(CAPACITY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        yield path
        process.communicate()
        assert process.returncode == 0


def fill(path: Path) -> None:
    tier = DiskTier(path, CAPACITY)
    assert all(tier.write(record) for record in [*RECORDS, ELSEWHERE])
    tier.close()


def command(*arguments: str, code: int = 0) -> str:
    """What it prints."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["thalweg", "cache", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert (end.value.code or 0) == code, err.getvalue()
    return out.getvalue()


def names(path: Path) -> set[str]:
    catalogue = Catalogue(path / CATALOGUE_NAME)
    try:
        return {entry.name for entry in catalogue.entries("durable")}
    finally:
        catalogue.close()


def test_list(directory: Path) -> None:
    seen = json.loads(run_alone("cache", "ls", "--kv-disk-dir", str(directory), "--json"))
    assert (seen["records"], seen["capacity_bytes"]) == (5, CAPACITY)
    mine = [entry for entry in seen["entries"] if entry["namespace"] == (b"n" * 16).hex()]
    assert [(e["kind"], e["first_token"], e["tokens"], e["checkpoints"]) for e in mine] == [
        ("rows", 0, 512, [512]),
        ("checkpoint", 384, 512, [512]),
        ("rows", 512, 768, [768]),
        ("checkpoint", 640, 768, [768]),
    ]
    assert {path.name for path in directory.glob("*.kv")} == {entry["name"] for entry in seen["entries"]}
    table = run("cache", "ls", str(directory))
    assert "0 to 512" in table and "6e6e6e6e" in table and "5 records" in table


def test_verify_and_delete(directory: Path) -> None:
    assert "5 records, 0 damaged" in command("verify", str(directory))
    path = directory / RECORDS[0].head.name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"{path.name}: checksum mismatch in unit 3 of 4" in command("verify", str(directory), code=1)
    assert "1 damaged; deleted" in command("verify", str(directory), "--delete", code=1)
    assert not path.exists() and path.name not in names(directory)
    assert "3 are unreachable" in command("verify", str(directory))
    assert "deleted 3 unreachable records" in command("gc", str(directory))
    assert names(directory) == {ELSEWHERE.head.name}


def test_collect(directory: Path) -> None:
    (directory / "notes.txt").write_text("mine")
    for name, age in (("a", 10_000), ("b", 0)):
        path = directory / f"r-{name * 32}-1.kv.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    assert command("gc", str(directory)).startswith("1 files or entries mended; deleted 0 ")
    assert {path.suffix for path in directory.iterdir()} >= {".tmp", ".txt"}, "a young half may have a writer"
    assert len(names(directory)) == 5
    assert "evicted 5 records" in command("gc", str(directory), "--to", "0")
    assert names(directory) == set() and not list(directory.glob("*.kv"))


def test_export_and_import(directory: Path, tmp_path: Path) -> None:
    archive, target = tmp_path / "a.tar", tmp_path / "new"
    assert "5 records" in command("export", str(archive), "--kv-disk-dir", str(directory))
    assert "exists; use --force" in run("cache", "export", str(archive), str(directory), ok=False)
    assert "there is no cache" in run("cache", "import", str(archive), str(target), ok=False)
    assert "0 imported, 5 known" in command("import", str(archive), str(directory))
    assert command("import", str(archive), str(target), "--kv-disk-space", "8MiB").startswith("5 imported")
    assert names(target) == names(directory)
    tier = DiskTier(target, CAPACITY)
    assert tier.find(DIGESTS).units == 6 and tier.find(DIGESTS).checkpoints == (4, 6)
    tier.close()
    out = command("export", str(archive), str(directory), "--force", "--namespace", "7878")
    assert out.startswith("1 records")


def test_import_trusts_nothing(directory: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    fresh = rows(chain(42), 0, 1, 100)
    other = DiskTier(tmp_path / "other", CAPACITY)
    assert other.write(fresh)
    other.close()
    sound = (tmp_path / "other" / fresh.head.name).read_bytes()
    version = sound[:8] + (9).to_bytes(4, "little") + sound[12:]
    (tmp_path / "sound").write_bytes(sound)
    (tmp_path / "broken").write_bytes(sound[:-1] + b"!")
    (tmp_path / "version").write_bytes(version)
    (tmp_path / "short").write_bytes(sound[:50])
    with tarfile.open(archive, "w") as tar:
        for name in ("broken", "version", "short"):
            tar.add(tmp_path / name, f"../../{name}.kv")
        tar.add(tmp_path / "other", "folder", recursive=False)
        tar.add(tmp_path / "sound", "../../outside.kv")
    before = {path for path in tmp_path.rglob("*") if path.suffix == ".kv"}
    out = command("import", str(archive), str(directory), code=1)
    assert "1 imported" in out and "4 refused" in out and "format version 9" in out
    after = {path for path in tmp_path.rglob("*") if path.suffix == ".kv"}
    assert after - before == {directory / fresh.head.name}
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) - 12_000])
    assert "refused" in command("import", str(archive), str(directory), code=1)


def test_import_keeps_to_the_cap(tmp_path: Path) -> None:
    big = DiskTier(tmp_path / "big", 64 << 20)
    digests = chain(*range(20))
    assert all(big.write(rows(digests, n, n + 1, 1 << 20)) for n in range(20))
    big.close()
    command("export", str(tmp_path / "a.tar"), str(tmp_path / "big"))
    out = command("import", str(tmp_path / "a.tar"), str(tmp_path / "small"), "--kv-disk-space", "8MiB")
    assert "6 imported, 0 known, 14 without room" in out
    assert sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= 8 << 20


def test_remove(directory: Path) -> None:
    assert "deleted 0 records" in command("rm", str(directory), "--older-than", "1h")
    assert "deleted 1 records" in command("rm", str(directory), "--namespace", "7878")
    assert names(directory) == {record.head.name for record in RECORDS}
    assert "deleted 4 records" in command("rm", str(directory), "--all")
    assert not list(directory.glob("*.kv"))


def test_a_server_tolerates_what_the_commands_do(tmp_path: Path) -> None:
    """What it found vanishes; what was imported is found."""
    fill(tmp_path)
    tier = DiskTier(tmp_path, CAPACITY)
    found = tier.find(DIGESTS)
    archive = str(tmp_path.parent / f"{tmp_path.name}.tar")
    run_alone("cache", "export", archive, str(tmp_path))
    run_alone("cache", "rm", str(tmp_path), "--all")
    assert tier.read_rows(found.pieces[0]) is None and tier.find(DIGESTS).units == 0
    assert tier.usage().rows_records == 0 and tier.usage().read_failures == 0
    run_alone("cache", "import", archive, str(tmp_path))
    found = tier.find(DIGESTS)
    assert found.units == 6 and all(tier.read_rows(piece) is not None for piece in found.pieces)
    tier.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls"], "say which cache: --kv-disk-dir"),
        (["ls", "/nonexistent"], "there is no cache in /nonexistent"),
        (["rm", "/nonexistent"], "say what to delete"),
        (["rm", "/nonexistent", "--older-than", "7"], "is no duration"),
        (["rm", "/nonexistent", "--namespace", "%"], "is not the beginning"),
        (["gc", "/nonexistent", "--to", "many"], "to: 'many' is not a number of bytes"),
        (["import", "/nonexistent.tar", "/nonexistent", "--kv-disk-space", "8MiB"], "/nonexistent.tar is no file"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    assert words in run("cache", *arguments, ok=False)


def test_a_damaged_catalogue_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / CATALOGUE_NAME).write_bytes(b"garbage" * 1000)
    assert "the next server that starts with it rebuilds it" in run("cache", "ls", str(tmp_path), ok=False)


def test_a_catalogue_that_cannot_be_opened_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    monkeypatch.setattr("thalweg.memory.folder.Catalogue", mock.Mock(side_effect=error))
    said = run("cache", "ls", str(tmp_path), ok=False)
    assert "database is locked" in said and "rebuilds" not in said


def test_an_archive_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "cache")
    nowhere = str(tmp_path / "nowhere" / "a.tar")
    assert nowhere in run("cache", "export", nowhere, str(tmp_path / "cache"), ok=False)
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("tarfile.TarFile.addfile", full)
    said = run("cache", "export", str(tmp_path / "a.tar"), str(tmp_path / "cache"), ok=False)
    assert "a.tar" in said and "No space left" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
