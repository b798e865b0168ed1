"""store_rows and read_rows against twins of the byte formats: every code, scales at their ends, odd widths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import formats
from tests.kernels.backends import Kernels, every_backend, every_quick_backend, interpreted
from tests.kernels.threads import ANY_THREADS, threads
from thalweg.cache.geometry import RowKind, StreamSpec
from thalweg.kernels.arguments import Packing, StoredRows, plain_rows
from thalweg.kernels.registry import reference_kernels
from thalweg.memory.layout import CacheLayout, RowFormat

__all__ = ["threads"]
REFERENCE = reference_kernels()
KV_SHAPES = [(512, 64), (72, 8), (64, 16), (32, 8), (41, 10), (194, 2)]
INDEX_WIDTHS = [128, 64, 16, 48, 2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 1e-4, 448.0, 2.0**127, 3.4e38, -3.4e38, 1e-38, 2.0**-149, 2.0**-126 * 6]),
)


def stored(packing: Packing, width: int, rope_dim: int = 0, slots: int = 5) -> StoredRows:
    """Slots that read as NaN until they are written, in rows of the size that the layout says."""
    kind, form = {
        Packing.FP8_KV: (RowKind.KV, RowFormat.FP8),
        Packing.FP8_INDEX: (RowKind.INDEX, RowFormat.FP8),
        Packing.FP4_INDEX: (RowKind.INDEX, RowFormat.FP4),
    }[packing]
    layout = CacheLayout(RowFormat.FP8, form, rope_dim)
    size = layout.row_bytes(StreamSpec("x", kind, (0,), 1, 1, width))
    return StoredRows(torch.full((slots, size), 255, dtype=torch.uint8), packing, width, rope_dim)


def twins(packing: Packing, width: int, rope_dim: int) -> tuple[Callable, Callable]:
    if packing is Packing.FP8_KV:
        return lambda row: formats.pack_kv(row, rope_dim), lambda raw: formats.unpack_kv(raw, width, rope_dim)
    if packing is Packing.FP8_INDEX:
        return formats.pack_index_fp8, lambda raw: formats.unpack_index_fp8(raw, width)
    return formats.pack_index_fp4, lambda raw: formats.unpack_index_fp4(raw, width)


CASES = [
    *((Packing.FP8_KV, width, rope) for width, rope in KV_SHAPES),
    *((packing, width, 0) for packing in (Packing.FP8_INDEX, Packing.FP4_INDEX) for width in INDEX_WIDTHS),
]


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal bits, every NaN being one."""
    nan = ours.isnan()
    return bool((nan == theirs.isnan()).all()) and torch.equal(
        ours[~nan].contiguous().view(torch.int32), theirs[~nan].contiguous().view(torch.int32)
    )


def fp32(values: list[list[float]]) -> Tensor:
    """Values above fp32 are infinite there; none are made by writing, all by reading arbitrary bytes."""
    return torch.tensor(values, dtype=torch.float64).float()


def test_the_sizes_of_v4() -> None:
    assert stored(Packing.FP8_KV, 512, 64).data.shape[1] == 584
    assert stored(Packing.FP8_INDEX, 128).data.shape[1] == 132
    assert stored(Packing.FP4_INDEX, 128).data.shape[1] == 68


@every_quick_backend()
@pytest.mark.parametrize(("packing", "width", "rope"), CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_are_written_as_the_format_says(
    kernels: Kernels, packing: Packing, width: int, rope: int, data: st.DataObject
) -> None:
    """Any numbers, infinities and NaN too: bytes and values of the twin, in the slots asked for and no others."""
    few = st.lists(NUMBERS, min_size=1, max_size=12)
    rows = [(data.draw(few) * width)[:width] for _ in range(2)]
    pack, unpack = twins(packing, width, rope)
    cache = stored(packing, width, rope)
    kernels.store_rows(cache, torch.tensor([3, 1]), torch.tensor(rows))
    for slot, row in ((3, rows[0]), (1, rows[1])):
        raw = pack(torch.tensor(row).tolist())
        if not any(math.isnan(v) for v in row):
            assert bytes(cache.data[slot].tolist()) == raw
        assert same(kernels.read_rows(cache, torch.tensor([slot])), fp32([unpack(raw)]))
    untouched = kernels.read_rows(cache, torch.tensor([[0, 2], [4, 0]]))
    assert untouched.shape == (2, 2, width) and untouched.isnan().all()


@every_backend()
@pytest.mark.parametrize(("packing", "width", "rope"), CASES)
def test_every_byte_is_read_as_the_format_says(kernels: Kernels, packing: Packing, width: int, rope: int) -> None:
    cache = stored(packing, width, rope, slots=600)
    values = torch.randint(0, 256, cache.data.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    cache.data[:] = values
    cache.data[:256, :] = torch.arange(256, dtype=torch.uint8)[:, None]  # every code, under every scale
    _, unpack = twins(packing, width, rope)
    expected = fp32([unpack(bytes(row)) for row in cache.data.tolist()])
    assert same(kernels.read_rows(cache, torch.arange(600)), expected)


@every_quick_backend()
def test_every_code_survives_under_every_scale(kernels: Kernels) -> None:
    """Writing what was read gives the same values again; scales below those that writing makes are left out."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    for exponent in range(105, 246):  # from 1e-4 / 448 to where 448 would be above 2^127
        cache = stored(Packing.FP8_KV, 264, 8)
        cache.data.zero_()
        cache.data[0, :254], cache.data[0, 272:277] = codes, exponent
        again(kernels, cache)
    nibbles = torch.arange(16, dtype=torch.uint8)
    for exponent in range(1, 252):
        cache = stored(Packing.FP4_INDEX, 32)
        cache.data[0, :16], cache.data[0, 16] = nibbles | (15 - nibbles) << 4, exponent
        again(kernels, cache)


def again(kernels: Kernels, cache: StoredRows) -> None:
    first = kernels.read_rows(cache, torch.tensor([0]))
    kernels.store_rows(cache, torch.tensor([1]), first)
    assert same(kernels.read_rows(cache, torch.tensor([1])), first)


@every_quick_backend()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=9))
def test_rounded_rows_are_held_exactly(kernels: Kernels, dtype: torch.dtype, values: list[float]) -> None:
    """round_* give what writing and reading back gives, and rounding twice is rounding once."""
    row = torch.tensor(values).repeat(128)[None, :128].to(dtype)
    slots = torch.tensor([0])
    for packing, rounded in (
        (Packing.FP8_KV, kernels.round_kv(row, 32)),
        (Packing.FP4_INDEX, kernels.round_index(row)),
    ):
        assert rounded.dtype is dtype
        cache = stored(packing, 128, 32 if packing is Packing.FP8_KV else 0)
        kernels.store_rows(cache, slots, rounded)
        assert same(kernels.read_rows(cache, slots), rounded.float())
    assert same(kernels.round_kv(kernels.round_kv(row, 32), 32).float(), kernels.round_kv(row, 32).float())
    cache = stored(Packing.FP8_INDEX, 128)
    kernels.store_rows(cache, slots, row)
    assert same(kernels.read_rows(cache, slots), kernels.round_index_fp8(row))


@every_backend()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    cache = plain_rows(torch.zeros(4, 6, dtype=dtype))
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    kernels.store_rows(cache, torch.tensor([2, 0]), rows)
    read = kernels.read_rows(cache, torch.tensor([[0], [2]]))
    assert read.dtype is torch.float32 and torch.equal(read[:, 0], rows[[1, 0]].to(dtype).float())


@every_backend()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[3, -1, 0, -1], [-1, -1, -1, -1]])
def test_a_slot_of_minus_one_is_written_nowhere(kernels: Kernels, dtype: torch.dtype, slots: list[int]) -> None:
    """Its row may hold anything: it stands for a sequence that is not there."""
    rows = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    rows[1] = float("nan")
    caches = (
        plain_rows(torch.full((4, 128), 7.0, dtype=dtype)),
        stored(Packing.FP8_KV, 128, 64, slots=4),
        stored(Packing.FP4_INDEX, 128, slots=4),
    )
    for cache in caches:
        expected = cache.data.clone()
        for slot, row in zip(slots, rows, strict=True):
            if slot >= 0:
                kernels.store_rows(StoredRows(expected, *_form(cache)), torch.tensor([slot]), row[None].to(dtype))
        kernels.store_rows(cache, torch.tensor(slots), rows.to(dtype))
        assert torch.equal(cache.data.view(torch.uint8), expected.view(torch.uint8))


def _form(cache: StoredRows) -> tuple[Packing, int, int]:
    return cache.packing, cache.width, cache.rope_dim


def any_bits(*shape: int, seed: int = 0) -> Tensor:
    """fp32 of every kind: a third are any 32 bits, NaN and infinities too, a third of any size, a third ordinary."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
    ordinary = torch.randn(shape, generator=generator)
    sized = ordinary * torch.exp2(torch.randint(-150, 128, (*shape[:-1], 1), generator=generator).double()).float()
    kind = torch.randint(0, 3, (*shape[:-1], 1), generator=generator)
    return torch.where(kind == 0, bits, torch.where(kind == 1, sized, ordinary))


@every_backend()
@ANY_THREADS
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("packing", "width", "rope"), CASES)
def test_many_rows_are_those_of_the_reference(
    kernels: Kernels, packing: Packing, width: int, rope: int, narrow: bool
) -> None:
    """Bytes of rows without NaN, values of all; slots in any order, in a pool that is a part of a larger one."""
    count = 1 + (1 << (13 if interpreted(kernels) else 17)) // width
    rows = any_bits(count, width)
    rows = rows.bfloat16() if narrow else rows
    ours, theirs = (stored(packing, width, rope, slots=count + 3) for _ in range(2))
    ours = StoredRows(torch.cat([ours.data, ours.data], 1)[:, : theirs.data.shape[1]], packing, width, rope)
    slots = torch.randperm(count + 3, generator=torch.Generator().manual_seed(1))[:count]
    kernels.store_rows(ours, slots, rows)
    REFERENCE.store_rows(theirs, slots, rows)
    whole = slots[~rows.isnan().any(-1)]
    assert len(whole) > count // 3 and torch.equal(ours.data[whole], theirs.data[whole])
    read = kernels.read_rows(ours, slots.view(1, -1))
    assert read.shape == (1, count, width) and same(read[0], REFERENCE.read_rows(theirs, slots))


@every_backend()
@ANY_THREADS
@pytest.mark.parametrize("width", [2, 8, 16, 64, 128, 512])
def test_many_rounded_rows_are_those_of_the_reference(kernels: Kernels, width: int) -> None:
    rows = any_bits(1 + (1 << (13 if interpreted(kernels) else 17)) // width, width, seed=width)
    for ours, theirs in (
        (kernels.round_index(rows), REFERENCE.round_index(rows)),
        (kernels.round_index_fp8(rows), REFERENCE.round_index_fp8(rows)),
        (kernels.round_kv(rows, 2), REFERENCE.round_kv(rows, 2)),
        (kernels.round_kv(rows[None, 1:], width // 2), REFERENCE.round_kv(rows[None, 1:], width // 2)),
    ):
        assert ours.shape == theirs.shape and same(ours, theirs)
    assert kernels.round_index(rows[:0]).shape == (0, width)
    assert kernels.round_index(rows.bfloat16()).dtype is kernels.round_kv(rows.bfloat16(), 2).dtype is torch.bfloat16


@every_backend()
@ANY_THREADS
@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
def test_plain_rows_of_any_dtype(kernels: Kernels, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Into pools of one dtype, from rows of another; no rows at all."""
    pool, given = dtypes
    rows = any_bits(700, 130).to(given)
    ours, theirs = (plain_rows(torch.zeros(900, 130, dtype=pool)) for _ in range(2))
    slots = torch.randperm(900, generator=torch.Generator().manual_seed(1))[:700]
    kernels.store_rows(ours, slots, rows)
    kernels.store_rows(ours, slots[:0], rows[:0])
    REFERENCE.store_rows(theirs, slots, rows)
    assert same(ours.data.float(), theirs.data.float())
    assert same(kernels.read_rows(ours, slots.flip(0)), REFERENCE.read_rows(theirs, slots.flip(0)))
    assert kernels.read_rows(ours, slots[:0]).shape == (0, 130)
