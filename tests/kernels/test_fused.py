"""Ops of one pass give the bits of their parts, one after another: norm_rotate, rotate_to and insert_entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import Kernels, every_backend
from thalweg.kernels.arguments import EntryTarget, Packing, RowRounding, StoredRows, TokenRows, Windows
from thalweg.kernels.cases.stored import INDEX_FORMATS, KV_FORMATS, Format
from thalweg.kernels.spec import spec_of
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels

EPS = 1e-6
FLOATS = (torch.float32, torch.bfloat16)
KV = [(form, rounding) for form in KV_FORMATS for rounding in (RowRounding.NONE, RowRounding.KV)]
INDEX = [
    *((INDEX_FORMATS[0], rounding) for rounding in (RowRounding.NONE, RowRounding.INDEX, RowRounding.INDEX_FP8)),
    (INDEX_FORMATS[1], RowRounding.INDEX),
    (INDEX_FORMATS[2], RowRounding.NONE),
    (INDEX_FORMATS[3], RowRounding.INDEX),
]
CASES = [(*form, 72, 8) for form in KV] + [(*form, 128, 64) for form in INDEX]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turns(count: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = random(count, pairs, seed=9) * 50
    return angles.cos(), angles.sin()


@every_backend()
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "rope"), [((7, 3, 40), 8), ((5, 64), 64), ((4, 2, 3, 18), 2), ((0, 3, 40), 8)])
def test_norm_rotate(kernels: Kernels, shape: tuple[int, ...], rope: int, weighted: bool, dtype: torch.dtype) -> None:
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype) if weighted else None
    before, turn = x.clone(), turns(shape[0], rope // 2)
    ours = kernels.norm_rotate(x, weight, EPS, *turn)
    assert ours.dtype is dtype and torch.equal(x, before), "a new tensor"
    assert torch.equal(ours, kernels.rotate(kernels.rms_norm(x, weight, EPS), *turn))


@every_backend()
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "rope"), [((7, 3, 40), 8), ((5, 17), 10), ((0, 3, 40), 8)])
def test_rotate_to(kernels: Kernels, shape: tuple[int, ...], rope: int, dtype: torch.dtype) -> None:
    x, turn = random(*shape), turns(shape[0], rope // 2)
    expected = kernels.rotate(x.clone(), *turn).to(dtype)
    ours = kernels.rotate_to(x.clone(), *turn, dtype)
    assert ours.dtype is dtype and ours.shape == shape and torch.equal(ours, expected)


@every_backend()
def test_rotate_takes_axes_in_any_order(kernels: Kernels) -> None:
    x, turn = random(4, 3, 5, 18), turns(4, 4)
    swapped = x.clone().transpose(1, 2)
    assert kernels.rotate(swapped, *turn) is swapped
    close = (swapped.transpose(1, 2) - kernels.rotate(x, *turn)).abs().max()
    assert close <= spec_of("rotate").tolerance


def scene(entries: int, width: int, *, overlap: bool) -> Windows:
    """Four tokens each, cached ones and new ones in turn; of the first entry there is no window before."""

    def rows(seed: int) -> TokenRows:
        pool = torch.full((2 * entries + 3, 2 * width), float("nan"))  # what is not a token's is not a number
        slots = torch.arange(2 * entries).flip(0) + 2
        pool[slots] = random(2 * entries, 2 * width, seed=seed)
        new = random(2 * entries, 6 * width, seed=seed + 1)
        return TokenRows(pool, slots, new[:, width : 3 * width])

    own = torch.randperm(4 * entries, generator=torch.Generator().manual_seed(3)).view(entries, 4)
    if not overlap:
        return Windows(rows(4), own)
    previous = own.flip(0).clone()
    previous[0], previous[1, 2] = -1, -1
    return Windows(rows(4), own, rows(6), previous)


def one_after_another(
    kernels: Kernels, windows: Windows, weight: Tensor, turn: tuple[Tensor, Tensor], target: EntryTarget
) -> None:
    before = None if windows.rows_before is None else windows.rows_before.joined()
    pooled = kernels.compress(windows.rows.joined(), windows.own, before, windows.previous)
    rows = kernels.rotate(kernels.rms_norm(pooled.to(weight.dtype), weight, EPS), *turn)
    match target.rounding:
        case RowRounding.KV:
            rows = kernels.round_kv(rows, target.stored.rope_dim)
        case RowRounding.INDEX:
            rows = kernels.round_index(rows)
        case RowRounding.INDEX_FP8:
            rows = kernels.round_index_fp8(rows)
    kernels.store_rows(target.stored, target.slots, rows)


def bits(stored: StoredRows) -> Tensor:
    return stored.data.contiguous().view(torch.uint8)


@every_backend()
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("form", "rounding", "width", "rope"), CASES)
def test_entries(
    kernels: Kernels, form: Format, rounding: RowRounding, width: int, rope: int, overlap: bool, dtype: torch.dtype
) -> None:
    """In every format, among slots that nobody writes to."""
    windows, weight, turn = scene(5, width, overlap=overlap), random(width, seed=1).to(dtype), turns(5, rope // 2)
    kept = rope if form in KV_FORMATS and form.packing in (Packing.PLAIN, Packing.FP8_KV) and width == 72 else 0
    slots = torch.tensor([8, 1, 5, 3, 6])
    ours, theirs = (EntryTarget(form.empty(10, width, kept), slots, rounding) for _ in range(2))
    kernels.insert_entries(windows, weight, EPS, *turn, ours)
    one_after_another(kernels, windows, weight, turn, theirs)
    assert torch.equal(bits(ours.stored), bits(theirs.stored))
    read = kernels.read_rows(ours.stored, slots)
    assert not read.isnan().any() and read.abs().max() > 0.5


@every_backend()
def test_no_entries(kernels: Kernels) -> None:
    windows = scene(5, 32, overlap=False)
    target = EntryTarget(KV_FORMATS[0].empty(3, 32, 8), torch.arange(0), RowRounding.NONE)
    nothing = Windows(windows.rows, windows.own[:0])
    kernels.insert_entries(nothing, random(32), EPS, *(x[:0] for x in turns(5, 4)), target)
    assert target.stored.data.isnan().all()


@pytest.mark.parametrize(("form", "width", "rope"), [(KV_FORMATS[2], 72, 8), (INDEX_FORMATS[3], 64, 0)])
def test_triton_writes_nothing_to_no_slot(form: Format, width: int, rope: int) -> None:
    try:
        kernels = triton_kernels()
    except TritonMissing as missing:
        pytest.skip(str(missing))
    windows, weight, turn = scene(5, width, overlap=True), random(width, seed=1), turns(5, 4)
    slots, rounding = torch.tensor([4, -1, 0, -1, 2]), RowRounding.NONE
    ours, theirs = (form.empty(5, width, rope) for _ in range(2))
    kernels.insert_entries(windows, weight, EPS, *turn, EntryTarget(ours, slots, rounding))
    live = slots >= 0
    previous = windows.previous
    assert previous is not None
    some = Windows(windows.rows, windows.own[live], windows.rows_before, previous[live])
    kernels.insert_entries(some, weight, EPS, *(x[live] for x in turn), EntryTarget(theirs, slots[live], rounding))
    assert torch.equal(bits(ours), bits(theirs))
    kernels.store_rows(ours, torch.tensor([-1, 3, -1]), random(3, width))
    kernels.store_rows(theirs, torch.tensor([3]), random(3, width)[1:2])
    assert torch.equal(bits(ours), bits(theirs)) and bits(ours)[1].min() == 255
