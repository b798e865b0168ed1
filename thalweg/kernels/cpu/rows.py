"""Cached rows in their byte formats: written to their slots and gathered from them in one pass.

Slots must lie in the pool, and elements of a row beside each other: neither is checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Packing, StoredRows
from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.cpu.quantize import FORMATS
from thalweg.kernels.reference import rows as plain

PLAIN_FORMATS = {torch.float32: 0, torch.bfloat16: 1}  # pools of other dtypes are left to torch


def store_rows(library: Library, stored: StoredRows, slots: Tensor, rows: Tensor) -> None:
    if not (count := slots.numel()):
        return
    form = _format(stored)
    if form is None:
        plain.store_rows(stored, slots, rows)
        return
    data, narrow = stored.data, rows.dtype is torch.bfloat16
    rows, slots = rows.contiguous() if narrow else wide(rows), slots.contiguous()
    library.store_rows(
        address(rows), narrow, count, address(slots), data.data_ptr(), data.stride(0) * data.element_size(), form,
        stored.width, stored.rope_dim, library.threads,
    )  # fmt: skip


def read_rows(library: Library, stored: StoredRows, slots: Tensor) -> Tensor:
    form = _format(stored)
    if form is None:
        return plain.read_rows(stored, slots)
    data, slots = stored.data, slots.contiguous()
    out = torch.empty((*slots.shape, stored.width))
    if count := slots.numel():
        library.read_rows(
            data.data_ptr(), data.stride(0) * data.element_size(), address(slots), count, form, stored.width,
            stored.rope_dim, address(out), library.threads,
        )  # fmt: skip
    return out


def _format(stored: StoredRows) -> int | None:
    """The number of a row format in native/quantize.cpp; None where there is none."""
    return PLAIN_FORMATS.get(stored.data.dtype) if stored.packing is Packing.PLAIN else FORMATS[stored.packing]
