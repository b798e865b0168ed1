"""Cases of new entries on their way from tokens to cache rows.

Rounding makes a small difference a whole step where a value lies between two steps. So entries to be rounded are drawn
again until none of them has such a value: what is compared is the arithmetic, not on which side of a tie it came out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import EntryTarget, Packing, RowRounding, StoredRows, TokenRows, Windows
from thalweg.kernels.cases.case import Bind, Bound, Call, Case, Source, Wide, cast
from thalweg.kernels.cases.rows import NORM_EPS
from thalweg.kernels.cases.stored import INDEX_FORMATS, KV_FORMATS, Format
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference import quantize
from thalweg.kernels.reference.backend import reference_kernels

_NEAR = 4e-6  # several times what sums in fp32 leave open in a normed entry
_REFERENCE = reference_kernels()
KV_ROUNDINGS = (
    (KV_FORMATS[0], RowRounding.NONE),
    (KV_FORMATS[1], RowRounding.NONE),
    (KV_FORMATS[0], RowRounding.KV),
    (KV_FORMATS[2], RowRounding.KV),
)
INDEX_ROUNDINGS = (  # rows of an FP8 index hold an fp32 scale, which float64 has no place for: as values only
    (INDEX_FORMATS[0], RowRounding.NONE),
    (INDEX_FORMATS[0], RowRounding.INDEX_FP8),
    (INDEX_FORMATS[0], RowRounding.INDEX),
    (INDEX_FORMATS[3], RowRounding.INDEX),
)


def insert_entries(
    shape: str,
    form: tuple[Format, RowRounding],
    entries: int,
    tokens: int,
    width: int,
    rope: int,
    *,
    overlap: bool,
    steady: bool = True,
) -> Case:
    """`form`: in what format, and rounded to what. Every third token is a cached one; with overlap some entries have no
    window before. `steady`: no value near a tie, for which entries are drawn again and again.
    """

    def inputs(source: Source) -> Bind:
        drawn = _Drawn(source, entries, tokens, width, rope, overlap)
        if steady:
            drawn.settle(*form)
        return drawn.bind(*form)

    sizes = {"entries": entries, "tokens": tokens * (1 + overlap), "width": width, "rope": rope}
    return Case(
        "insert_entries",
        shape,
        sizes | {"row_bytes": form[0].row_bytes(width, rope)},
        entries,
        inputs,
        lambda stored: (_REFERENCE.read_rows(stored, torch.arange(len(stored.data))),),
    )


class _Drawn:
    """Random tokens of some entries, and what their entries are normed and turned by."""

    def __init__(self, source: Source, entries: int, tokens: int, width: int, rope: int, overlap: bool) -> None:
        self._source, self._width, self._rope = source, width, rope
        count = entries * tokens
        angles = source.normal(entries, rope // 2) * 100
        self._weight, self._cos, self._sin = source.normal(width), angles.cos(), angles.sin()
        self._own = source.order(count).view(entries, tokens)
        self._rows = source.normal(count, 2 * width)
        self._previous, self._before = self._own, self._rows[:0]
        if overlap:
            self._before = source.normal(count, 2 * width)
            self._previous = source.order(count).view(entries, tokens).clone()
            self._previous[::5] = -1

    def settle(self, form: Format, rounding: RowRounding) -> None:
        while True:
            unsettled = self._near_ties(form, rounding)
            if not unsettled.any():
                return
            again = self._own[unsettled].flatten()
            self._rows[again] = self._source.normal(len(again), 2 * self._width)

    def bind(self, form: Format, rounding: RowRounding) -> Bind:
        def bind(kernels: Kernels, dtype: torch.dtype) -> Bound:
            def bound(chosen: Tensor | None) -> Call:
                entries = torch.arange(len(self._own)) if chosen is None else chosen
                windows = self._windows(entries, dtype)
                cos, sin = (cast(Wide(x[entries]), dtype) for x in (self._cos, self._sin))
                weight = cast(Wide(self._weight), dtype)
                stored = _wide(form, dtype).empty(len(entries), self._width, self._rope)
                target = EntryTarget(stored, torch.arange(len(entries)), rounding)

                def call() -> StoredRows:
                    kernels.insert_entries(windows, weight, NORM_EPS, cos, sin, target)
                    return stored

                return call

            return bound

        return bind

    def _windows(self, entries: Tensor, dtype: torch.dtype) -> Windows:
        own, previous = self._own[entries], self._previous[entries]
        rows = _token_rows(cast(Wide(self._rows), dtype))
        if not len(self._before):
            return Windows(rows, own)
        return Windows(rows, own, _token_rows(cast(Wide(self._before), dtype)), previous)

    def _near_ties(self, form: Format, rounding: RowRounding) -> Tensor:
        """Which entries have other values if a little is added to them, or taken from them."""
        windows = self._windows(torch.arange(len(self._own)), torch.float32)
        before = None if windows.rows_before is None else windows.rows_before.joined()
        pooled = _REFERENCE.compress(windows.rows.joined(), windows.own, before, windows.previous)
        entries = _REFERENCE.norm_rotate(pooled, self._weight, NORM_EPS, self._cos, self._sin)
        if rounding is RowRounding.INDEX:
            entries = quantize.hadamard(entries)
        above, below = (self._kept(entries + by, form, rounding) for by in (_NEAR, -_NEAR))
        return ((above - below).abs() > 4 * _NEAR).any(-1)

    def _kept(self, entries: Tensor, form: Format, rounding: RowRounding) -> Tensor:
        match rounding:
            case RowRounding.KV:
                return quantize.round_kv(entries, self._rope)
            case RowRounding.INDEX:
                return quantize.unpack_index_fp4(quantize.pack_index_fp4(entries), self._width)
            case RowRounding.INDEX_FP8:
                return quantize.round_index_fp8(entries)
            case RowRounding.NONE:
                return entries.to(form.dtype).float()


def _token_rows(rows: Tensor) -> TokenRows:
    """The first third of them in every second slot of a pool."""
    count = len(rows) // 3
    pool = torch.full((2 * count + 1, rows.shape[1]), float("nan"), dtype=rows.dtype)
    slots = torch.arange(count).flip(0) * 2 + 1
    pool[slots] = rows[:count]
    return TokenRows(pool, slots, rows[count:])


def _wide(form: Format, dtype: torch.dtype) -> Format:
    """fp32 rows of a reference in float64 are float64 ones."""
    plain = form.packing is Packing.PLAIN and form.dtype is torch.float32
    return Format(form.name, dtype=torch.promote_types(dtype, torch.float32)) if plain else form
