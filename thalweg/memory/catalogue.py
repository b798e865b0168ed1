"""Which records a tier holds, in SQLite: a file beside the records on disk, or in memory for those in RAM.

Rows and their byte sums change in one transaction, so that threads and processes agree on how much room is left.
Records hang on each other: rows on the unit before them, a checkpoint on its own unit. Whatever another one hangs on is
evicted after it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from thalweg.cache.retention import priority, risen
from thalweg.memory.record import DIGEST_BYTES, RecordHead, RecordKind, split_digests
from thalweg.memory.tier import Found, Piece

SCHEMA_VERSION = 1
LOG_BYTES = 1 << 20  # the write-ahead log never grows beyond
_TURN_BYTES = LOG_BYTES // 2  # a longer log is first written back; one transaction adds less than the other half
STEP_RECORDS = 16  # deleted or added in one transaction, so that it stays that small
_BUSY_SECONDS = 5.0
# Failures to open a catalogue that say nothing of its contents.
_OUTSIDE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
)
_PARAMETERS = 500  # in one statement
_STALE = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS record (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, kind INTEGER NOT NULL, namespace BLOB NOT NULL,
  origin BLOB NOT NULL, anchor BLOB NOT NULL, first BLOB NOT NULL, digests BLOB NOT NULL, first_unit INTEGER NOT NULL,
  unit_tokens INTEGER NOT NULL, saved_tokens INTEGER NOT NULL, bytes INTEGER NOT NULL, uses INTEGER NOT NULL,
  used_at REAL NOT NULL, priority REAL NOT NULL, durable INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_first ON record (first);
CREATE INDEX IF NOT EXISTS by_anchor ON record (anchor);
CREATE INDEX IF NOT EXISTS by_origin ON record (origin);
CREATE INDEX IF NOT EXISTS by_priority ON record (priority, first_unit DESC);
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value);
CREATE TABLE IF NOT EXISTS total (kind INTEGER PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (1, 0, 0), (2, 0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON record BEGIN
  UPDATE total SET records = records + 1, bytes = bytes + new.bytes WHERE kind = new.kind; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON record BEGIN
  UPDATE total SET records = records - 1, bytes = bytes - old.bytes WHERE kind = old.kind; END;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as the catalogue knows it. `digests` is the joined table; `bytes` what it takes of the capacity."""

    name: str
    kind: int
    namespace: bytes
    origin: bytes
    anchor: bytes
    first: bytes
    digests: bytes
    first_unit: int
    unit_tokens: int
    saved_tokens: int
    bytes: int
    uses: int
    used_at: float  # seconds since 1970
    priority: float
    durable: bool

    @property
    def units(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    @property
    def boundary_tokens(self) -> int:
        """Tokens of the prompt up to the end of this record."""
        return (self.first_unit + self.units) * self.unit_tokens


Limit = Callable[[sqlite3.Connection], int]  # bytes that all records may take, asked within a transaction
Remove = Callable[[Entry], None]  # deletes the bytes of a record, before its entry goes

_NAMES = tuple(field.name for field in fields(Entry))
_COLUMNS = ", ".join(f"record.{name}" for name in _NAMES)
_INSERT = f"INSERT INTO record ({', '.join(_NAMES)}) VALUES ({', '.join('?' * len(_NAMES))})"
_CLOCK = "SELECT value FROM setting WHERE name = 'clock'"
_USE = f"""UPDATE record SET uses = uses + ?1, used_at = ?2,
  priority = priority(({_CLOCK}), uses + ?1, saved_tokens, bytes) WHERE name = ?3"""


def entry_of(head: RecordHead, size_bytes: int, now: float, *, durable: bool) -> Entry:
    """A new entry, used once; it gets its priority when it is added."""
    return Entry(
        head.name, head.kind, head.namespace, head.origin, head.anchor, head.digests[0], b"".join(head.digests),
        head.first_unit, head.unit_tokens, head.saved_tokens, size_bytes, 1, now, 0.0, durable,
    )  # fmt: skip


class Catalogue:
    """See the module. `path` None keeps it in memory. Methods raise sqlite3.Error for what the disk or the file does.

    Finding has a connection of its own and never waits for a writer.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._write = _connect(path)
        self._read, self._read_lock = self._write, self._lock
        self._firsts: set[bytes] = set()  # first digests of all records up to id `_seen`, and of some that are gone
        self._seen = 0
        try:
            self._prepare()
            if path is not None:
                self._read, self._read_lock = _connect(path), threading.Lock()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        found = self._write.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"catalogue version {found}; this build reads {SCHEMA_VERSION}")
        if found == SCHEMA_VERSION:
            return
        with self.transaction() as database:
            for statement in _SCHEMA.split(";\n"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            database.execute("INSERT OR IGNORE INTO setting VALUES ('clock', 0.0)")

    def close(self) -> None:
        """Close the connections."""
        self._read.close()
        self._write.close()

    def check(self) -> None:
        """Read the whole file. Raises sqlite3.DatabaseError if it is damaged."""
        self._write.execute(f"SELECT {_COLUMNS}, total.records, value FROM record, total, setting LIMIT 0")
        result = self._write.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            raise sqlite3.DatabaseError(result)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One atomic change. Raises sqlite3.Error, and changes nothing, if it cannot be made."""
        with self._lock:
            self._bound_log()
            self._write.execute("BEGIN IMMEDIATE")
            try:
                yield self._write
                self._write.execute("COMMIT")
            except BaseException:
                if self._write.in_transaction:
                    self._write.execute("ROLLBACK")
                raise

    def _bound_log(self) -> None:
        if self.path is None or _size(_beside(self.path, "-wal")) <= _TURN_BYTES:
            return
        self._write.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if _size(_beside(self.path, "-wal")) > _TURN_BYTES:
            raise sqlite3.OperationalError("a long reader keeps the catalogue's log from being written back")

    # Reading

    def find(self, digests: Sequence[bytes]) -> Found:
        """See Tier.find. Records may overlap: the pieces reach as far as any choice of them does."""
        table = b"".join(digests)
        spans: list[tuple[int, int, str]] = []  # first unit, end of the match, name
        checkpoints: list[int] = []
        end = 0
        with self._read_lock:
            self._learn()
            for unit in [number for number, digest in enumerate(digests) if digest in self._firsts]:
                if unit > end:
                    break
                found = self._starting(digests[unit])
                checkpoints += [unit + 1 for _, kind, _ in found if kind == RecordKind.CHECKPOINT]
                starts = [(name, own) for name, kind, own in found if kind == RecordKind.ROWS]
                spans += [(unit, unit + _common_units(own, table, unit * DIGEST_BYTES), name) for name, own in starts]
                end = max((end, *(span[1] for span in spans[len(spans) - len(starts) :])))
        pieces = tuple(_cover(spans, digests))
        return Found(pieces, end, tuple(boundary for boundary in checkpoints if boundary <= end))

    def _starting(self, digest: bytes) -> list[tuple[str, int, bytes]]:
        query = "SELECT name, kind, digests FROM record WHERE first = ? AND durable"
        return self._read.execute(query, (digest,)).fetchall()

    def _learn(self) -> None:
        """Take in the first digests of records that were added since, here or by another process."""
        fresh = self._read.execute("SELECT id, first FROM record WHERE id > ? ORDER BY id", (self._seen,)).fetchall()
        if not fresh:
            return
        self._firsts.update(first for _, first in fresh)
        self._seen = fresh[-1][0]
        if len(self._firsts) > 2 * self._count() + _STALE:
            self._firsts = {row[0] for row in self._read.execute("SELECT first FROM record")}

    def _count(self) -> int:
        return self._read.execute("SELECT sum(records) FROM total").fetchone()[0]

    def entry(self, name: str) -> Entry | None:
        """The entry of that name, durable or not."""
        return next(iter(self.entries("name = ?", name)), None)

    def entries(self, where: str = "1", *values: str | bytes | float) -> list[Entry]:
        """Entries that meet a condition, parents before what hangs on them."""
        query = f"SELECT {_COLUMNS} FROM record WHERE {where} ORDER BY first_unit, kind, name"
        with self._read_lock:
            return [Entry(*row) for row in self._read.execute(query, values).fetchall()]

    def totals(self) -> dict[RecordKind, tuple[int, int]]:
        """Records and bytes by kind, those reserved but not yet written included."""
        with self._read_lock:
            rows = self._read.execute("SELECT kind, records, bytes FROM total").fetchall()
        return {RecordKind(kind): (records, size) for kind, records, size in rows}

    def file_bytes(self) -> int:
        """Bytes of the catalogue's own files."""
        return sum(_size(_beside(self.path, ending)) for ending in ("", "-wal", "-shm")) if self.path else 0

    def other_weights(self, origin: bytes, namespace: bytes) -> bool:
        """See Tier.other_weights."""
        query = "SELECT 1 FROM record WHERE origin = ? AND namespace != ? AND durable LIMIT 1"
        with self._read_lock:
            return any(origin) and self._read.execute(query, (origin, namespace)).fetchone() is not None

    def setting(self, name: str) -> float | None:
        """A number kept with the records, such as `capacity`."""
        with self._read_lock:
            row = self._read.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    # Changing

    def compact(self) -> None:
        """Give the pages of what was deleted back to the disk. What is left goes through the log once."""
        with self._lock:
            self._write.execute("VACUUM")
            self._write.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def set(self, name: str, value: float) -> None:
        """Keep a number."""
        with self.transaction() as database:
            database.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, value))

    def admit(self, entry: Entry, limit: Limit, remove: Remove) -> bool:
        """Add an entry, evicting others until all take at most `limit` bytes.

        False if there is no room for it, or if its name is known. What it hangs on is never evicted for it.
        """
        while True:
            with self.transaction() as database:
                if database.execute("SELECT 1 FROM record WHERE name = ?", (entry.name,)).fetchone():
                    return False
                excess = _total(database) + entry.bytes - limit(database)
                if excess <= 0:
                    database.execute(_INSERT, astuple(entry))
                    database.execute(_USE, (0, entry.used_at, entry.name))
                    return True
                if entry.bytes > limit(database) or not _evict(database, excess, remove, entry.anchor):
                    return False

    def shrink(self, limit: Limit, remove: Remove) -> bool:
        """Evict until all records take at most `limit` bytes. False if that could not be reached."""
        while True:
            with self.transaction() as database:
                excess = _total(database) - limit(database)
                if excess <= 0:
                    return True
                if not _evict(database, excess, remove, b""):
                    return False

    def add(self, entries: Sequence[Entry]) -> None:
        """Add entries whose bytes are there already; those with a known name are passed over."""
        for at in range(0, len(entries), STEP_RECORDS):
            with self.transaction() as database:
                for entry in entries[at : at + STEP_RECORDS]:
                    database.execute(_INSERT.replace("INSERT", "INSERT OR IGNORE"), astuple(entry))
                    database.execute(_USE, (0, entry.used_at, entry.name))

    def settle(self, name: str) -> bool:
        """Mark a reserved record as written. False if another process has forgotten it meanwhile."""
        with self.transaction() as database:
            return database.execute("UPDATE record SET durable = 1 WHERE name = ?", (name,)).rowcount == 1

    def forget(self, entries: Iterable[Entry], remove: Remove) -> int:
        """Delete entries and, by `remove`, their bytes, what hangs on others first; the bytes forgotten."""
        forgotten = 0
        ordered = sorted(entries, key=lambda entry: (-entry.first_unit, -entry.kind))
        for at in range(0, len(ordered), STEP_RECORDS):
            with self.transaction() as database:
                for entry in ordered[at : at + STEP_RECORDS]:
                    remove(entry)
                    forgotten += entry.bytes * _delete(database, entry)
        return forgotten

    def use(self, uses: Mapping[str, int], now: float) -> None:
        """Count uses of records by name."""
        names = sorted(uses)
        for at in range(0, len(names), STEP_RECORDS):
            with self.transaction() as database:
                database.executemany(_USE, [(uses[name], now, name) for name in names[at : at + STEP_RECORDS]])


def is_damage(error: sqlite3.Error) -> bool:
    """Whether a catalogue that could not be opened is damaged or of another version, and so to be rebuilt."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF not in _OUTSIDE


def unreachable(entries: Iterable[Entry]) -> list[Entry]:
    """Of entries, parents first, those whose chain from the start of a prompt is broken."""
    reached: set[bytes] = set()
    lost = []
    for entry in entries:
        if entry.anchor in reached or (entry.kind == RecordKind.ROWS and entry.first_unit == 0):
            reached.update(split_digests(entry.digests))
        else:
            lost.append(entry)
    return lost


def _connect(path: Path | None) -> sqlite3.Connection:
    connection = sqlite3.connect(path or ":memory:", _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.create_function("priority", 4, priority, deterministic=True)
    # NORMAL: commits reach the disk late, but records are found again by their own headers.
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 64", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA cache_size = -16384")
    return connection


def _total(database: sqlite3.Connection) -> int:
    return database.execute("SELECT sum(bytes) FROM total").fetchone()[0]


def _delete(database: sqlite3.Connection, entry: Entry) -> bool:
    return database.execute("DELETE FROM record WHERE name = ?", (entry.name,)).rowcount == 1


def _evict(database: sqlite3.Connection, excess: int, remove: Remove, keep: bytes) -> int:
    """Delete records of least priority, leaves first, until `excess` bytes are free or one step is full; how many."""
    count = 0
    for entry in _leaves(database, keep):
        remove(entry)
        _delete(database, entry)
        clock = database.execute(_CLOCK).fetchone()[0]
        database.execute("UPDATE setting SET value = ? WHERE name = 'clock'", (risen(clock, entry.priority),))
        count, excess = count + 1, excess - entry.bytes
        if excess <= 0 or count == STEP_RECORDS:
            break
    return count


def _leaves(database: sqlite3.Connection, keep: bytes) -> Iterator[Entry]:
    """Evictable records, least priority first. The caller deletes each before it asks for the next.

    From the record of least priority down to one that nothing hangs on, and up again. A record that something
    unfinished hangs on, or the unit with digest `keep`, is passed over.
    """
    refused: set[str] = set()
    query = f"SELECT {_COLUMNS} FROM record ORDER BY priority, first_unit DESC LIMIT ?"
    while True:
        rows = database.execute(query, (len(refused) + 1,)).fetchall()
        path = [entry for entry in (Entry(*row) for row in rows) if entry.name not in refused][:1]
        if not path:
            return
        while path:
            children = _children(database, path[-1])
            below = [child for child in children if child.name not in refused]
            if below:
                path.append(min(below, key=lambda entry: entry.priority))
                continue
            entry = path.pop()
            kept = entry.kind == RecordKind.ROWS and keep in split_digests(entry.digests)
            if children or kept or not entry.durable:
                refused.add(entry.name)
            else:
                yield entry


def _children(database: sqlite3.Connection, entry: Entry) -> list[Entry]:
    """Records that hang on one of the units of this one."""
    if entry.kind == RecordKind.CHECKPOINT:
        return []
    found: list[Entry] = []
    digests = split_digests(entry.digests)
    for at in range(0, len(digests), _PARAMETERS):
        part = digests[at : at + _PARAMETERS]
        query = f"SELECT {_COLUMNS} FROM record WHERE anchor IN ({', '.join('?' * len(part))})"
        found += [Entry(*row) for row in database.execute(query, part)]
    return found


def _common_units(own: bytes, prompt: bytes, start: int) -> int:
    """How many leading digests of a record are those of the prompt from byte `start` of its table on."""
    if prompt.startswith(own, start):
        return len(own) // DIGEST_BYTES
    most = min(len(own), len(prompt) - start)
    steps = range(0, most, DIGEST_BYTES)
    same = (own[at : at + DIGEST_BYTES] == prompt[start + at : start + at + DIGEST_BYTES] for at in steps)
    return next((number for number, equal in enumerate(same) if not equal), most // DIGEST_BYTES)


def _cover(spans: list[tuple[int, int, str]], digests: Sequence[bytes]) -> Iterator[Piece]:
    """Choose spans, given by ascending start, that reach the farthest end: always the longest that begins in time."""
    chosen: list[tuple[int, int, str]] = []
    best = (0, 0, "")
    for span in spans:
        if span[0] > (chosen[-1][1] if chosen else 0):
            chosen.append(best)
        best = max(best, span, key=lambda candidate: candidate[1])
    if best[1] > (chosen[-1][1] if chosen else 0):
        chosen.append(best)
    ends = [start for start, _, _ in chosen[1:]] + [end for _, end, _ in chosen[-1:]]
    for (start, _, name), end in zip(chosen, ends, strict=True):
        yield Piece(name, start, end - start, digests[end - 1])


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
