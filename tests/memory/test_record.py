"""The file format: round trips, and no damage that is taken for data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.records import chain, checkpoint, rows
from thalweg.cache.retention import priority, risen
from thalweg.memory.record import (
    FORMAT_VERSION,
    PAGE_BYTES,
    Record,
    RecordError,
    RecordHead,
    RecordKind,
    announced_bytes,
    decode,
    decode_header,
    encode_header,
    header_bytes,
)


def encoded(record: Record) -> bytes:
    return encode_header(record) + record.data.tobytes()


@given(
    st.sampled_from(RecordKind),
    st.integers(1, 200),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**63),
    st.binary(min_size=16, max_size=16),
)
def test_round_trip(kind: RecordKind, units: int, row_bytes: int, first: int, saved: int, seed: bytes) -> None:
    units = 1 if kind is RecordKind.CHECKPOINT else units
    digests = tuple(chain(*range(units), namespace=seed))
    head = RecordHead(kind, seed, seed[::-1], first, digests, seed, saved, 128)
    record = Record(head, np.random.default_rng(0).integers(0, 256, (units, row_bytes), np.uint8))
    content = encoded(record)
    assert announced_bytes(content) == (header_bytes(units), len(content))
    assert header_bytes(units) % PAGE_BYTES == 0
    again = decode(content)
    assert again.head == head and np.array_equal(again.data, record.data)


@pytest.mark.parametrize("kind", RecordKind)
def test_every_flipped_byte_is_noticed(kind: RecordKind) -> None:
    digests = chain(1, 2, 3)
    record = rows(digests, 0, 3, 5) if kind is RecordKind.ROWS else checkpoint(digests, 2, 11)
    content = bytearray(encoded(record))
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        with pytest.raises(RecordError):
            decode(bytes(content))
        content[at] ^= 1 << at % 8
    assert decode(bytes(content)).head == record.head


def test_every_truncation_is_noticed() -> None:
    content = encoded(rows(chain(1, 2), 0, 2, 9))
    for length in range(len(content)):
        with pytest.raises(RecordError):
            decode(content[:length])
    with pytest.raises(RecordError):
        decode(content + b"\0")


def test_other_versions_are_refused_by_number() -> None:
    content = bytearray(encoded(rows(chain(1), 0, 1)))
    content[8:12] = (FORMAT_VERSION + 1).to_bytes(4, "little")
    with pytest.raises(RecordError, match=f"version {FORMAT_VERSION + 1}"):
        decode_header(bytes(content[:PAGE_BYTES]))


def test_names_tell_records_apart() -> None:
    digests = chain(1, 2, 3, 4)
    records = [rows(digests, 0, 2), rows(digests, 0, 3), rows(digests, 1, 3), checkpoint(digests, 2)]
    assert len({record.head.name for record in records}) == 4
    assert rows(chain(1, namespace=b"x" * 16), 0, 1).head.name != rows(chain(1), 0, 1).head.name


@given(st.floats(0, 1e9), st.integers(1, 1000), st.integers(0, 10**6), st.integers(1, 10**9), st.floats(0, 1e9))
def test_retention(clock: float, uses: int, saved: int, size: int, evicted: float) -> None:
    worth = priority(clock, uses, saved, size)
    assert worth >= clock
    assert priority(clock, uses + 1, saved, size) >= worth >= priority(clock, uses, saved, size + 1)
    assert priority(clock, uses, saved + 1, size) >= worth
    assert risen(clock, evicted) >= max(clock, evicted)
    assert priority(risen(clock, worth), 1, 0, size) >= worth, "what is used now beats what was evicted"
