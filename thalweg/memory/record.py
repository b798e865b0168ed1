"""What the lower tiers keep: rows of consecutive units, or the checkpoint of one, and their file format, version 1.

A unit's digest is chained (blake2b of its parent's digest and its tokens, from a root that stands for the namespace),
so it names the whole prefix, the weights, the layout and the tenant. docs/cache-format.md has the byte table.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

DIGEST_BYTES = 16
PAGE_BYTES = 4096  # the payload starts on such a boundary
FORMAT_VERSION = 1
NAME = re.compile(r"[rc]-[0-9a-f]{32}-([1-9][0-9]{0,5})\.kv")

_MAGIC = b"thalweg\0"
_FIXED = struct.Struct("<8s I I I I Q I I Q 16s 16s 16s")
_LETTERS = "?rc"

Bytes = NDArray[np.uint8]


class RecordError(ValueError):
    """A file, or bytes, that are no sound record of this version. Never leaves the tiers: there it is a miss."""


class RecordKind(IntEnum):
    ROWS = 1  # compressed rows of one or more consecutive units
    CHECKPOINT = 2  # window and tail state at the end of one unit


@dataclass(frozen=True, slots=True)
class RecordHead:
    """What a record is of. `first_unit` counts the units before it; a checkpoint's boundary is after its one unit."""

    kind: RecordKind
    namespace: bytes  # 16 bytes
    parent: bytes  # digest of the unit before the first one, or of the root
    first_unit: int
    digests: tuple[bytes, ...]  # of its units
    origin: bytes  # digest of the prompt's first unit under the tenant alone: the same for other weights; or zeros
    saved_tokens: int  # tokens of compute that a hit saves
    unit_tokens: int

    @property
    def anchor(self) -> bytes:
        """The digest without which this record is of no use: that before the rows, or the checkpoint's own."""
        return self.parent if self.kind is RecordKind.ROWS else self.digests[0]

    @property
    def name(self) -> str:
        """Name of the record and of its file. The last digest stands for all that came before it."""
        return _name(self.kind, self.digests[-1], len(self.digests))


@dataclass(frozen=True, slots=True)
class Record:
    """A head and its data, uint8 [len(head.digests), row bytes], contiguous. Who keeps it never writes to it."""

    head: RecordHead
    data: Bytes

    def __post_init__(self) -> None:
        assert self.data.dtype == np.uint8 and self.data.ndim == 2 and self.data.flags.c_contiguous
        assert len(self.data) == len(self.head.digests) > 0 and self.data.shape[1] > 0
        assert self.head.kind is RecordKind.ROWS or len(self.data) == 1, "a checkpoint belongs to one unit"
        own = (self.head.namespace, self.head.parent, self.head.origin, *self.head.digests)
        assert all(len(digest) == DIGEST_BYTES for digest in own)


@dataclass(frozen=True, slots=True)
class Header:
    """A decoded header: the head, the bytes of one row of the payload, and each row's checksum."""

    head: RecordHead
    row_bytes: int
    checksums: tuple[int, ...]

    @property
    def payload_offset(self) -> int:
        return header_bytes(len(self.checksums))

    @property
    def file_bytes(self) -> int:
        return self.payload_offset + len(self.checksums) * self.row_bytes

    def check(self, rows: Bytes, first: int = 0) -> None:
        """Compare rows from the `first` one on with their checksums. Raises RecordError."""
        for unit, (row, checksum) in enumerate(zip(rows, self.checksums[first:], strict=False), first):
            if xxh3_64_intdigest(row) != checksum:
                raise RecordError(f"checksum mismatch in unit {unit} of {len(self.checksums)}")


def header_bytes(units: int) -> int:
    """Bytes before the payload: fixed fields, tables and the header's own checksum, up to a page boundary."""
    return -(-(_FIXED.size + units * (DIGEST_BYTES + 8) + 8) // PAGE_BYTES) * PAGE_BYTES


def checkpoint_name(digest: bytes) -> str:
    """Name of the checkpoint after the unit with this digest."""
    return _name(RecordKind.CHECKPOINT, digest, 1)


def name_units(name: str) -> int:
    """Units of the record that a file name stands for. Raises RecordError if it is none."""
    match = NAME.fullmatch(name)
    if match is None:
        raise RecordError(f"{name!r} is no name of a record")
    return int(match.group(1))


def encode_header(record: Record) -> bytes:
    """The bytes that go before the record's data in its file."""
    head, (units, row_bytes) = record.head, record.data.shape
    size = header_bytes(units)
    counts = (size, head.kind, units, row_bytes, head.unit_tokens, head.first_unit, head.saved_tokens)
    fixed = _FIXED.pack(_MAGIC, FORMAT_VERSION, *counts, head.namespace, head.parent, head.origin)
    checksums = (xxh3_64_intdigest(row) for row in record.data)
    block = b"".join((fixed, *head.digests, *(value.to_bytes(8, "little") for value in checksums)))
    block = block.ljust(size - 8, b"\0")
    return block + xxh3_64_intdigest(block).to_bytes(8, "little")


def announced_bytes(start: bytes) -> tuple[int, int]:
    """Header and file bytes that the first page of a file announces, not yet verified. Raises RecordError."""
    fields = _fixed(start)
    return header_bytes(fields[4]), header_bytes(fields[4]) + fields[4] * fields[5]


def decode_header(block: bytes) -> Header:
    """Verify and parse a whole header. Raises RecordError; another version is refused before anything is parsed."""
    _, _, size, kind, units, row_bytes, unit_tokens, first_unit, saved_tokens, *digests = _fixed(block)
    if len(block) < PAGE_BYTES or size != len(block) or size != header_bytes(units):
        raise RecordError(f"a header of {len(block):,} bytes where {header_bytes(units):,} were expected")
    if xxh3_64_intdigest(block[:-8]) != int.from_bytes(block[-8:], "little"):
        raise RecordError("checksum mismatch in the header")
    known = kind in (RecordKind.ROWS, RecordKind.CHECKPOINT)
    if not known or units < 1 or row_bytes < 1 or (kind == RecordKind.CHECKPOINT and units != 1):
        raise RecordError(f"kind {kind} with {units} units of {row_bytes} bytes")
    end = _FIXED.size + units * DIGEST_BYTES
    table = tuple(block[at : at + DIGEST_BYTES] for at in range(_FIXED.size, end, DIGEST_BYTES))
    checksums = struct.unpack_from(f"<{units}Q", block, end)
    namespace, parent, origin = digests
    head = RecordHead(RecordKind(kind), namespace, parent, first_unit, table, origin, saved_tokens, unit_tokens)
    return Header(head, row_bytes, checksums)


def decode(content: bytes | memoryview) -> Record:
    """Verify and parse a whole file, as archives hold them. Raises RecordError."""
    size, total = announced_bytes(bytes(content[:PAGE_BYTES]))
    if len(content) != total:
        raise RecordError(f"{len(content):,} bytes where {total:,} were expected")
    header = decode_header(bytes(content[:size]))
    data = np.frombuffer(content, np.uint8, offset=size).reshape(-1, header.row_bytes)
    header.check(data)
    return Record(header.head, data)


def split_digests(table: bytes) -> Sequence[bytes]:
    """The digests in a joined table of them."""
    return [table[at : at + DIGEST_BYTES] for at in range(0, len(table), DIGEST_BYTES)]


def _name(kind: RecordKind, last: bytes, units: int) -> str:
    return f"{_LETTERS[kind]}-{last.hex()}-{units}.kv"


def _fixed(block: bytes) -> tuple[Any, ...]:
    if len(block) < _FIXED.size or block[:8] != _MAGIC:
        raise RecordError("this is no cache record")
    fields = _FIXED.unpack_from(block)
    if fields[1] != FORMAT_VERSION:
        raise RecordError(f"format version {fields[1]}; this build reads {FORMAT_VERSION}")
    return fields
