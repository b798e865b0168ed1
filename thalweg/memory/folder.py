"""A directory of record files with their catalogue: one file per record, and never more bytes than the cap.

A record is written under a temporary name, synced, renamed and then recorded. Room is reserved in the catalogue before
the first byte is written, and the files of evicted records are gone before their room is given away. Several processes
may work on one directory: a server, and commands beside it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

import numpy as np

from thalweg.errors import ConfigError
from thalweg.memory.catalogue import LOG_BYTES, Catalogue, Entry, Remove, entry_of, is_damage
from thalweg.memory.files import Files
from thalweg.memory.record import (
    NAME,
    PAGE_BYTES,
    Bytes,
    Header,
    Record,
    RecordError,
    decode_header,
    encode_header,
    header_bytes,
    name_units,
)

CATALOGUE_NAME = "catalogue.sqlite"
TEMPORARY = ".tmp"
# Beside the records: the log, its index, the lock file, and what the catalogue may grow by until it is measured again.
OVERHEAD_BYTES = LOG_BYTES + (64 << 10) + PAGE_BYTES + (256 << 10)
_log = logging.getLogger(__name__)
_ABANDONED_SECONDS = 600.0  # a half-written file of that age has no writer any more


class Written(Enum):
    """What became of a record that was to be written."""

    STORED = auto()
    KNOWN = auto()  # it was stored before
    NO_ROOM = auto()  # or somebody else is just writing it


class RecordFolder:
    """See the module. Methods raise OSError, sqlite3.Error and, when they read, RecordError."""

    def __init__(self, directory: Path, files: Files | None = None, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self.files = files or Files()
        self.clock = clock
        path = directory / CATALOGUE_NAME
        with suppress(FileExistsError):
            self.files.close(self.files.create(path))  # SQLite would let others read it
        self.catalogue = Catalogue(path)

    def write(self, record: Record, evicted: Remove) -> Written:
        """Store a record; `evicted` is told of each that had to go for it."""
        name = record.head.name
        known = self.catalogue.entry(name)
        if known is not None:
            return Written.KNOWN if known.durable else Written.NO_ROOM
        header = encode_header(record)
        entry = entry_of(record.head, _whole_pages(len(header) + record.data.nbytes), self.clock(), durable=False)
        if not self.catalogue.admit(entry, record_limit, self._evicting(evicted)):
            return Written.NO_ROOM
        try:
            self._publish(name, [header, record.data.data.cast("B")])
            settled = self.catalogue.settle(name)
        except (OSError, sqlite3.Error):
            with suppress(OSError, sqlite3.Error):  # else the reservation stays, as the bytes may
                self.forget([entry])
            raise
        if not settled:
            self.remove(entry)
        return Written.STORED if settled else Written.NO_ROOM

    def _publish(self, name: str, parts: list[bytes | memoryview]) -> None:
        files, path = self.files, self.directory / name
        temporary = path.with_name(name + TEMPORARY)
        descriptor = files.create(temporary)
        try:
            files.write(descriptor, parts)
            files.sync(descriptor)
        finally:
            files.close(descriptor)
        files.rename(temporary, path)
        files.sync_directory(self.directory)

    def read(self, name: str, units: int, skip: int = 0) -> tuple[Header, Bytes]:
        """The header and the leading rows of a record without the first `skip` ones, verified."""
        descriptor = self.files.open(self.directory / name)
        try:
            header = self._header(descriptor, name)
            if self.files.size(descriptor) != header.file_bytes:
                raise RecordError(f"is not {header.file_bytes:,} bytes long")
            rows: Bytes = np.empty((units - skip, header.row_bytes), np.uint8)
            count = self.files.read(descriptor, rows.data.cast("B"), header.payload_offset + skip * header.row_bytes)
        finally:
            self.files.close(descriptor)
        if units > len(header.checksums) or count != rows.nbytes:
            raise RecordError(f"ends after {count:,} of {rows.nbytes:,} bytes")
        header.check(rows, skip)
        return header, rows

    def read_header(self, name: str) -> Header:
        """The header of a record, verified."""
        descriptor = self.files.open(self.directory / name)
        try:
            return self._header(descriptor, name)
        finally:
            self.files.close(descriptor)

    def _header(self, descriptor: int, name: str) -> Header:
        block = bytearray(header_bytes(name_units(name)))
        count = self.files.read(descriptor, memoryview(block), 0)
        header = decode_header(bytes(block[:count]))
        if header.head.name != name:
            raise RecordError(f"holds another record, {header.head.name}")
        return header

    def forget(self, entries: list[Entry]) -> int:
        """Delete records; the bytes forgotten."""
        return self.catalogue.forget(entries, self.remove)

    def remove(self, entry: Entry) -> None:
        """Delete a record's file, and what is half-written of it."""
        self.files.remove(self.directory / entry.name)
        if not entry.durable:
            self.files.remove(self.directory / (entry.name + TEMPORARY))

    def shrink(self, evicted: Remove, most_bytes: int | None = None) -> bool:
        """Evict until all files take at most the cap, or `most_bytes` if that is less. False if that is impossible."""

        def limit(database: sqlite3.Connection) -> int:
            over = 0 if most_bytes is None else max(0, capacity_bytes(database) - most_bytes)
            return max(0, record_limit(database) - over)

        return self.catalogue.shrink(limit, self._evicting(evicted))

    def shrink_catalogue(self) -> None:
        """Shrink a catalogue that alone takes more than the cap, as a far larger cache left it: no record is left then,
        so that its pages are empty."""
        with self.catalogue.transaction() as database:
            crowded = record_limit(database) < 0
        if crowded:
            self.catalogue.compact()

    def _evicting(self, evicted: Remove) -> Remove:
        def remove(entry: Entry) -> None:
            self.remove(entry)
            evicted(entry)

        return remove

    def reconcile(self, *, alone: bool) -> int:
        """Make catalogue and files agree; how many of either had to go or were taken in.

        `alone`: nobody else writes here, so whatever is half-written is abandoned, whatever its age.
        """
        entries = {entry.name: entry for entry in self.catalogue.entries()}  # before the files: those only follow
        listing = self.files.listing(self.directory)
        before = float("inf") if alone else self.clock() - _ABANDONED_SECONDS
        lost = [entry for name, entry in entries.items() if name not in listing]
        lost = [entry for entry in lost if entry.durable or entry.used_at < before]
        half = [name for name in listing if name.endswith(TEMPORARY) and NAME.fullmatch(name.removesuffix(TEMPORARY))]
        half = [name for name in half if listing[name].st_mtime < before]
        fresh = [name for name in listing if NAME.fullmatch(name) and not (name in entries and entries[name].durable)]
        self.forget(lost)
        for name in half:
            self._discard(name)
        self._adopt({name: listing[name] for name in fresh})
        return len(lost) + len(half) + len(fresh)

    def _adopt(self, listing: dict[str, os.stat_result]) -> None:
        """Take in files that were renamed but not recorded; those that are not sound, or cannot be read, go."""
        adopted = []
        for name, state in listing.items():
            try:
                header = self.read_header(name)
                if state.st_size != header.file_bytes:
                    raise RecordError(f"{state.st_size:,} bytes where {header.file_bytes:,} were expected")
            except FileNotFoundError:
                continue
            except (RecordError, OSError) as error:
                _log.warning("cache record %s: %s", self.directory / name, error)
                self._discard(name)
                continue
            adopted.append(entry_of(header.head, _whole_pages(state.st_size), state.st_mtime, durable=True))
        self.catalogue.add(adopted)
        for entry in adopted:
            self.catalogue.settle(entry.name)

    def _discard(self, name: str) -> None:
        """Delete a file that is of no use. One that cannot be deleted is no reason to do without the others."""
        try:
            self.forget(self.catalogue.entries("name = ?", name))
            self.files.remove(self.directory / name)
        except OSError as error:
            _log.warning("cache record %s cannot be deleted: %s", self.directory / name, error)


def open_folder(directory: Path) -> RecordFolder:
    """For commands: a directory that a server has used, or is using. Raises ConfigError."""
    if not (directory / CATALOGUE_NAME).is_file():
        raise ConfigError(f"kv_disk_dir: there is no cache in {directory}", param="kv_disk_dir")
    try:
        return RecordFolder(directory)
    except (OSError, sqlite3.Error) as error:
        damaged = isinstance(error, sqlite3.Error) and is_damage(error)
        after = "; the next server that starts with it rebuilds it" if damaged else ""
        message = f"kv_disk_dir: {directory / CATALOGUE_NAME}: {error}{after}"
        raise ConfigError(message, param="kv_disk_dir") from error


def capacity_bytes(database: sqlite3.Connection) -> int:
    """The cap of the directory, as the last server set it."""
    row = database.execute("SELECT value FROM setting WHERE name = 'capacity'").fetchone()
    return int(row[0]) if row else 0


def record_limit(database: sqlite3.Connection) -> int:
    """Bytes that records may take, so that all files together stay within the cap."""
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    return capacity_bytes(database) - OVERHEAD_BYTES - pages * PAGE_BYTES


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES
