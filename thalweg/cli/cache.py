"""`thalweg cache`: look at, check, clean, move and delete the disk cache, also while a server uses it."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.progress import bar, output
from thalweg.config.options import parse_bytes
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.memory.catalogue import Entry
    from thalweg.memory.folder import RecordFolder

app = typer.Typer(help="The disk cache: list, verify, clean, export, import, delete.", no_args_is_help=True)

Directory = Annotated[Path | None, typer.Argument(help="The cache's directory; or use --kv-disk-dir.")]
DiskDir = Annotated[
    Path | None, typer.Option("--kv-disk-dir", envvar="THALWEG_KV_DISK_DIR", help="The cache's directory.")
]
Namespace = Annotated[str | None, typer.Option(help="Only namespaces that begin so, as `ls` shows them.")]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@app.command("ls")
def list_(
    directory: Directory = None,
    kv_disk_dir: DiskDir = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """List the records: of which tokens, how big, how often used. A namespace is weights, layout and tenant."""
    with _opened(directory, kv_disk_dir) as folder:
        entries = folder.catalogue.entries("durable")
        capacity = int(folder.catalogue.setting("capacity") or 0)
        rows = list(_listed(entries))
        totals = {"records": len(rows), "bytes": sum(row["bytes"] for row in rows), "capacity_bytes": capacity}
        totals["catalogue_bytes"] = folder.catalogue.file_bytes()
    if json_:
        print(json.dumps(totals | {"entries": rows}))
    else:
        _print(rows, totals)


@app.command("verify")
def verify(
    directory: Directory = None,
    kv_disk_dir: DiskDir = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete damaged records.")] = False,
) -> None:
    """Read every record and compare its checksums, digests and place. The exit code is 1 if any is damaged."""
    from thalweg.memory.catalogue import unreachable

    with _opened(directory, kv_disk_dir) as folder:
        entries = folder.catalogue.entries("durable")
        damaged = []
        for entry in _shown("verifying", entries):
            reason = _damage(folder, entry)
            if reason is not None:
                damaged.append(entry)
                print(f"{entry.name}: {reason}")
        freed = folder.forget(damaged) if delete else 0
    print(f"{len(entries):,} records, {len(damaged):,} damaged" + (f"; deleted {freed:,} bytes" if delete else ""))
    lost = len(unreachable(entries))
    if lost:
        print(f"{lost:,} are unreachable: what they continue is gone; `thalweg cache gc` deletes them")
    if damaged:
        raise typer.Exit(1)


@app.command("gc")
def collect(
    directory: Directory = None,
    kv_disk_dir: DiskDir = None,
    to: Annotated[str | None, typer.Option(help="Then evict down to so many bytes, such as 20GiB.")] = None,
) -> None:
    """Delete half-written files, take in files that were not recorded, delete records that no prompt can reach."""
    from thalweg.memory.catalogue import unreachable

    size = None if to is None else parse_bytes(to, "to")
    evicted: list[int] = []
    with _opened(directory, kv_disk_dir) as folder:
        mended = folder.reconcile(alone=False)
        lost = unreachable(folder.catalogue.entries("durable"))
        freed = folder.forget(lost)
        fits = size is None or folder.shrink(lambda entry: evicted.append(entry.bytes), size)
    print(f"{mended:,} files or entries mended; deleted {len(lost):,} unreachable records, {freed:,} bytes")
    if size is not None:
        print(f"evicted {len(evicted):,} records, {sum(evicted):,} bytes" + ("" if fits else "; less is not possible"))


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="The archive to write: an uncompressed tar file.")],
    directory: Directory = None,
    kv_disk_dir: DiskDir = None,
    namespace: Namespace = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write all sound records into one file."""
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; use --force to replace it", param="file")
    where, values = _condition(namespace)
    written: Counter[str] = Counter()
    with _opened(directory, kv_disk_dir) as folder, _archive(file) as archive:
        for entry in _shown("exporting", folder.catalogue.entries(where, *values)):
            _export(folder, entry, archive, written)
    print(f"{written['records']:,} records, {written['bytes']:,} bytes in {file}; {written['skipped']:,} skipped")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An archive that `export` wrote.")],
    directory: Directory = None,
    kv_disk_dir: DiskDir = None,
    kv_disk_space: Annotated[
        str | None, typer.Option(help="Cap of a new cache, such as 100GiB; an existing one keeps its own.")
    ] = None,
) -> None:
    """Take in the records of an archive, each after its checksums agree. The exit code is 1 if any was refused."""
    from thalweg.memory.disk import DiskTier
    from thalweg.memory.folder import CATALOGUE_NAME

    target = _directory(directory, kv_disk_dir)
    if not file.is_file():
        raise ConfigError(f"{file} is no file", param="file")
    if not (target / CATALOGUE_NAME).exists():
        if kv_disk_space is None:
            message = f"kv_disk_dir: there is no cache in {target}; give --kv-disk-space to make one"
            raise ConfigError(message, param="kv_disk_dir")
        DiskTier(target, parse_bytes(kv_disk_space, "kv_disk_space")).close()
    counts: Counter[str] = Counter()
    with _opened(target, None) as folder:
        try:
            counts.update(_imported(folder, file))
        except (tarfile.TarError, EOFError) as error:
            print(f"{file}: {error}")
            counts["refused"] += 1
    print(", ".join(f"{counts[what]:,} {what}" for what in ("imported", "known", "without room", "refused")))
    if counts["refused"]:
        raise typer.Exit(1)


@app.command("rm")
def remove(
    directory: Directory = None,
    kv_disk_dir: DiskDir = None,
    namespace: Namespace = None,
    older_than: Annotated[str | None, typer.Option(help="Not used for so long: 90m, 12h, 7d, 2w.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
) -> None:
    """Delete records, without asking."""
    if not all_ and namespace is None and older_than is None:
        raise ConfigError("say what to delete: --namespace, --older-than or --all", param="all")
    where, values = _condition(namespace)
    before = time.time() - _age(older_than) if older_than is not None else float("inf")
    with _opened(directory, kv_disk_dir) as folder:
        entries = [entry for entry in folder.catalogue.entries(where, *values) if entry.used_at <= before]
        freed = folder.forget(entries)
    print(f"deleted {len(entries):,} records, {freed:,} bytes")


@contextmanager
def _opened(directory: Path | None, option: Path | None) -> Iterator[RecordFolder]:
    from thalweg.memory.folder import open_folder

    target = _directory(directory, option)
    folder = open_folder(target)
    try:
        yield folder
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{target}: {error}", param="kv_disk_dir") from error
    finally:
        folder.catalogue.close()


@contextmanager
def _archive(file: Path) -> Iterator[tarfile.TarFile]:
    """An archive to write, which gets its name once it is whole, and is deleted if it cannot be written."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                yield archive
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error}", param="file") from error
    finally:
        temporary.unlink(missing_ok=True)


def _directory(directory: Path | None, option: Path | None) -> Path:
    chosen = directory or option
    if chosen is None:
        raise ConfigError("say which cache: --kv-disk-dir DIRECTORY", param="kv_disk_dir")
    return chosen


def _condition(namespace: str | None) -> tuple[str, tuple[str, ...]]:
    """The entries to work on, as a condition of the catalogue's query and its values."""
    if namespace is None:
        return "durable", ()
    if not re.fullmatch("[0-9a-f]{1,32}", namespace):
        raise ConfigError(f"--namespace {namespace!r} is not the beginning of one as `ls` shows it", param="namespace")
    return "durable AND lower(hex(namespace)) LIKE ?", (namespace + "%",)


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if match is None:
        raise ConfigError(f"--older-than {text!r} is no duration; write for example 12h or 7d", param="older_than")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def _shown(what: str, entries: list[Entry]) -> Iterable[Entry]:
    with bar() as shown:
        yield from shown.track(entries, description=what)


def _damage(folder: RecordFolder, entry: Entry) -> str | None:
    """What is wrong with a record; None for a sound one, and for one that has been deleted meanwhile."""
    from thalweg.memory.catalogue import entry_of
    from thalweg.memory.record import RecordError

    try:
        header, _ = folder.read(entry.name, entry.units)
    except (OSError, RecordError) as error:
        return str(error) if folder.catalogue.entry(entry.name) is not None else None
    own = entry_of(header.head, entry.bytes, entry.used_at, durable=True)
    same = all(getattr(own, name) == getattr(entry, name) for name in ("namespace", "anchor", "digests", "first_unit"))
    return None if same else "the catalogue says that it is of other tokens"


def _export(folder: RecordFolder, entry: Entry, archive: tarfile.TarFile, written: Counter[str]) -> None:
    from thalweg.memory.record import Record, RecordError, encode_header

    try:
        header, rows = folder.read(entry.name, entry.units)
    except (OSError, RecordError) as error:
        print(f"{entry.name}: {error}")
        written["skipped"] += 1
        return
    content = encode_header(Record(header.head, rows)) + rows.tobytes()
    member = tarfile.TarInfo(entry.name)
    member.size, member.mtime, member.mode = len(content), int(entry.used_at), 0o600
    archive.addfile(member, io.BytesIO(content))
    written.update(records=1, bytes=len(content))


def _imported(folder: RecordFolder, file: Path) -> Iterator[str]:
    """Take in an archive; what became of each member."""
    missing: set[bytes] = set()
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            yield _import(folder, archive, member, missing)


def _import(folder: RecordFolder, archive: tarfile.TarFile, member: tarfile.TarInfo, missing: set[bytes]) -> str:
    """Take in one member; what became of it. Its name is shown, and never used: records name themselves.

    What continues a record without room, whose digests are in `missing`, shall not push out others.
    """
    from thalweg.memory.folder import Written
    from thalweg.memory.record import RecordError, decode

    stream = archive.extractfile(member) if member.isreg() else None
    if stream is None:
        print(f"{member.name!r}: not a plain file")
        return "refused"
    try:
        record = decode(stream.read())
        written = Written.NO_ROOM
        if record.head.anchor not in missing:
            written = folder.write(record, lambda entry: None)
        if written is Written.NO_ROOM:
            missing.update(record.head.digests)
    except RecordError as error:
        print(f"{member.name!r}: {error}")
        return "refused"
    return {Written.STORED: "imported", Written.KNOWN: "known", Written.NO_ROOM: "without room"}[written]


def _listed(entries: list[Entry]) -> Iterator[dict[str, Any]]:
    from thalweg.memory.record import RecordKind, split_digests

    boundaries = {e.first: e.boundary_tokens for e in entries if e.kind == RecordKind.CHECKPOINT}
    for entry in entries:
        yield {
            "namespace": entry.namespace.hex(),
            "kind": RecordKind(entry.kind).name.lower(),
            "first_token": entry.first_unit * entry.unit_tokens,
            "tokens": entry.boundary_tokens,
            "bytes": entry.bytes,
            "uses": entry.uses,
            "used_at": round(entry.used_at),
            "checkpoints": [boundaries[digest] for digest in split_digests(entry.digests) if digest in boundaries],
            "name": entry.name,
        }


def _print(rows: list[dict[str, Any]], totals: dict[str, int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = output()
    table = Table("namespace", "kind", "tokens", "bytes", "uses", "last used", "checkpoints at", box=SIMPLE_HEAD)
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used_at"]))
        place = str(row["tokens"]) if row["kind"] == "checkpoint" else f"{row['first_token']} to {row['tokens']}"
        checkpoints = " ".join(str(boundary) for boundary in row["checkpoints"])
        table.add_row(
            row["namespace"][:8], row["kind"], place, f"{row['bytes']:,}", str(row["uses"]), used, checkpoints
        )
    console.print(table)
    console.print(
        f"{totals['records']:,} records, {totals['bytes']:,} bytes and {totals['catalogue_bytes']:,} of the catalogue; "
        f"the cap is {totals['capacity_bytes']:,} bytes"
    )
