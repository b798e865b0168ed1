"""Cache rows in every byte format, and cases of the ops that write and read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.kernels.arguments import Packing, StoredRows
from thalweg.kernels.cases.case import Bind, Bound, Call, Case, Source, cast
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference import quantize
from thalweg.kernels.reference.backend import reference_kernels

_APART = 3  # slots from one written row to the next: what lies between must stay as it is
_PACKED_AT_ONCE = 1 << 22  # elements: packing takes several times its input


@dataclass(frozen=True, slots=True)
class Format:
    """How the rows of a stream lie in memory. `dtype` matters to plain rows alone."""

    name: str
    packing: Packing = Packing.PLAIN
    dtype: torch.dtype = torch.float32

    def empty(self, slots: int, width: int, rope: int) -> StoredRows:
        """Rows that read as NaN until they are written."""
        if self.packing is Packing.PLAIN:
            return StoredRows(torch.full((slots, width), float("nan"), dtype=self.dtype), self.packing, width, rope)
        size = self.row_bytes(width, rope)
        return StoredRows(torch.full((slots, size), 255, dtype=torch.uint8), self.packing, width, rope)

    def row_bytes(self, width: int, rope: int) -> int:
        row = torch.zeros(1, width)
        match self.packing:
            case Packing.PLAIN:
                return width * self.dtype.itemsize
            case Packing.FP8_KV:
                return quantize.pack_kv(row, rope).shape[-1]
            case Packing.FP8_INDEX:
                return quantize.pack_index_fp8(row).shape[-1]
            case Packing.FP4_INDEX:
                return quantize.pack_index_fp4(row).shape[-1]


_PLAIN = (Format("float32"), Format("bfloat16", dtype=torch.bfloat16))
KV_FORMATS = (*_PLAIN, Format("fp8", Packing.FP8_KV))
INDEX_FORMATS = (*_PLAIN, Format("fp8", Packing.FP8_INDEX), Format("fp4", Packing.FP4_INDEX))
WIDE = _PLAIN[0]


def fill(stored: StoredRows, slots: Tensor, rows: Tensor) -> None:
    """Write rows as the reference does, some at a time."""
    store, count = reference_kernels().store_rows, max(1, _PACKED_AT_ONCE // rows.shape[1])
    for part, own in zip(slots.split(count), rows.split(count), strict=True):
        store(stored, part, own)


def store_rows(shape: str, form: Format, rows: int, width: int, rope: int = 0) -> Case:
    """The result is the memory around each row: its own bytes and those of two slots that nobody writes to."""

    def inputs(source: Source) -> Bind:
        x = source.normal(rows, width) * 10 ** source.normal(rows, 1).clamp(-1, 1)

        def bind(kernels: Kernels, dtype: torch.dtype) -> Bound:
            def bound(chosen: Tensor | None) -> Call:
                own = cast(x if chosen is None else x[chosen], dtype)
                stored = form.empty(_APART * len(own), width, rope)
                slots, whole = torch.arange(len(own)) * _APART + 1, stored.data.unflatten(0, (-1, _APART))

                def call() -> Tensor:
                    kernels.store_rows(stored, slots, own)
                    return whole

                return call

            return bound

        return bind

    sizes = {"rows": rows, "width": width, "element": 4, "row_bytes": form.row_bytes(width, rope)}
    return Case("store_rows", shape, sizes, rows, inputs)


def read_rows(shape: str, form: Format, rows: int, width: int, rope: int = 0) -> Case:
    """Plain rows of any size, packed ones of any bytes: every code under any scale, NaN too."""

    def inputs(source: Source) -> Bind:
        stored = form.empty(2 * rows + 1, width, rope)
        if form.packing is Packing.PLAIN:
            fill(stored, torch.arange(2 * rows + 1), source.normal(2 * rows + 1, width))
        else:
            stored.data.copy_(source.integers(0, 256, *stored.data.shape))
        slots = source.order(2 * rows + 1)[:rows]

        def bind(kernels: Kernels, dtype: torch.dtype) -> Bound:
            def bound(chosen: Tensor | None) -> Call:
                own = slots if chosen is None else slots[chosen]
                return lambda: kernels.read_rows(stored, own)

            return bound

        return bind

    sizes = {"rows": rows, "width": width, "row_bytes": form.row_bytes(width, rope)}
    return Case("read_rows", shape, sizes, rows, inputs)
