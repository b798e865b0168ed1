"""The tier on disk: a RecordFolder that belongs to one server, and whose failures are misses and dropped writes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from thalweg.errors import ConfigError
from thalweg.memory.catalogue import Entry, is_damage
from thalweg.memory.files import Files
from thalweg.memory.folder import CATALOGUE_NAME, RecordFolder, Written
from thalweg.memory.record import Bytes, Record, RecordError, checkpoint_name
from thalweg.memory.tier import Found, Piece, Tally, TierUsage, usage_of

LEAST_CAPACITY_BYTES = 4 << 20
LOCK_NAME = "lock"
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the file may be sound
_log = logging.getLogger(__name__)


class DiskTier:
    """A Tier. What `write` returned True for is found again after any crash, until it is evicted.

    Raises ConfigError if the directory cannot be used, another server uses it, or the capacity is too small.
    """

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if capacity_bytes < LEAST_CAPACITY_BYTES:
            message = f"kv_disk_space: {capacity_bytes:,} bytes are below the least, {LEAST_CAPACITY_BYTES:,}"
            raise ConfigError(message, param="kv_disk_space")
        self.capacity_bytes = capacity_bytes
        self._clock = clock
        self._tally = Tally()
        self._told: set[tuple[str, object]] = set()  # kinds of errors that were logged
        self._touches: dict[str, int] = {}
        self._touch_lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(directory)
            try:
                self._folder = _open(directory, capacity_bytes, files or Files(), clock)
            except BaseException:
                self._lock.close()
                raise
        except (OSError, sqlite3.Error) as error:
            message = f"kv_disk_dir: {directory} cannot be used: {error}"
            raise ConfigError(message, param="kv_disk_dir") from error

    def find(self, digests: Sequence[bytes]) -> Found:
        try:
            return self._folder.catalogue.find(digests)
        except sqlite3.Error as error:
            self._failed("find", error)
            return Found((), 0, ())

    def read_rows(self, piece: Piece, skip: int = 0) -> Bytes | None:
        return self._read(piece.record, skip, piece.units, piece.digest)

    def read_checkpoint(self, digest: bytes) -> Bytes | None:
        rows = self._read(checkpoint_name(digest), 0, 1, digest)
        if rows is None:
            return None
        self._use([checkpoint_name(digest)])
        return rows[0]

    def write(self, record: Record) -> bool:
        """See Tier. True: the record survives a crash."""
        try:
            self._flush()
            written = self._folder.write(record, self._evicted)
        except (OSError, sqlite3.Error) as error:
            self._failed("write", error)
            written = Written.NO_ROOM
        if written is Written.STORED:
            self._tally.add(writes=1, write_bytes=record.data.nbytes)
        elif written is Written.NO_ROOM:
            self._tally.add(dropped=1)
        return written is not Written.NO_ROOM

    def touch(self, found: Found) -> None:
        self._use([piece.record for piece in found.pieces])

    def other_weights(self, origin: bytes, namespace: bytes) -> bool:
        try:
            return self._folder.catalogue.other_weights(origin, namespace)
        except sqlite3.Error as error:
            self._failed("find", error)
            return False

    def clear(self) -> int:
        try:
            return self._folder.forget(self._folder.catalogue.entries("durable"))
        except (OSError, sqlite3.Error) as error:
            self._failed("clear", error)
            return 0

    def usage(self) -> TierUsage:
        try:
            totals = self._folder.catalogue.totals()
            own = self._folder.catalogue.file_bytes()
        except (OSError, sqlite3.Error) as error:
            self._failed("usage", error)
            totals, own = {}, 0
        return usage_of(self.capacity_bytes, own, totals, self._tally)

    def close(self) -> None:
        try:
            self._flush()
            self._folder.catalogue.close()
        except sqlite3.Error as error:
            self._failed("close", error)
        self._lock.close()

    def _read(self, name: str, first: int, end: int, digest: bytes) -> Bytes | None:
        try:
            header, rows = self._folder.read(name, end, first)
            if header.head.digests[end - 1] != digest:
                raise RecordError("holds other tokens")
        except (OSError, RecordError) as error:
            self._missed(name, error)
            return None
        self._tally.add(hits=1, read_bytes=rows.nbytes)
        return rows

    def _missed(self, name: str, error: OSError | RecordError) -> None:
        """Count a failed read, and delete the record unless the failure may pass."""
        self._tally.add(misses=1)
        if not isinstance(error, FileNotFoundError):  # those were evicted, or deleted by a command
            self._tally.add(read_failures=1)
            _log.warning("cache record %s: %s", self._folder.directory / name, error)
        if isinstance(error, OSError) and error.errno in _PASSING:
            return
        try:
            self._folder.forget(self._folder.catalogue.entries("name = ? AND durable", name))
        except (OSError, sqlite3.Error) as failure:
            self._failed("delete", failure)

    def _use(self, names: Sequence[str]) -> None:
        """Remember uses. They are written down before the next record is, when the choice of what to evict needs them:
        whoever reads never waits for the disk to write."""
        with self._touch_lock:
            for name in names:
                self._touches[name] = self._touches.get(name, 0) + 1

    def _flush(self) -> None:
        with self._touch_lock:
            touches, self._touches = self._touches, {}
        try:
            self._folder.catalogue.use(touches, self._clock())
        except sqlite3.Error as error:
            self._failed("touch", error)

    def _evicted(self, entry: Entry) -> None:
        self._tally.add(evicted=1, evicted_bytes=entry.bytes)

    def _failed(self, what: str, error: OSError | sqlite3.Error) -> None:
        """Log the first failure of a kind: a full disk fails thousands of times."""
        kind = (what, error.errno if isinstance(error, OSError) else str(error))
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("disk cache in %s: %s failed, and goes on without: %s", self._folder.directory, what, error)


def _open(directory: Path, capacity_bytes: int, files: Files, clock: Callable[[], float]) -> RecordFolder:
    """The folder, with a sound catalogue that agrees with the files, within the cap."""
    try:
        folder = _checked(directory, files, clock)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        _log.warning("%s: %s; it is rebuilt from the records", directory / CATALOGUE_NAME, error)
        for ending in ("-wal", "-shm", ""):
            files.remove(directory / (CATALOGUE_NAME + ending))
        folder = _checked(directory, files, clock)
    try:
        folder.catalogue.set("capacity", capacity_bytes)
        folder.reconcile(alone=True)
        folder.shrink(lambda entry: None)
        folder.shrink_catalogue()
        folder.catalogue.find(())  # reads the first digests now, not with the first prompt
    except BaseException:
        folder.catalogue.close()
        raise
    return folder


def _checked(directory: Path, files: Files, clock: Callable[[], float]) -> RecordFolder:
    folder = RecordFolder(directory, files, clock)
    try:
        folder.catalogue.check()
    except sqlite3.Error:
        folder.catalogue.close()
        raise
    return folder


def _lock(directory: Path) -> TextIO:
    """Take the directory for this process; closing the file gives it back. Raises ConfigError if another one has it."""
    path = directory / LOCK_NAME
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = lock.read(20).strip() or "unknown"
        lock.close()
        message = f"kv_disk_dir: {directory} is in use by another server, process {holder}; give each its own"
        raise ConfigError(message, param="kv_disk_dir") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock
