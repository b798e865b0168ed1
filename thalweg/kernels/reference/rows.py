"""Cached rows in their byte formats: the one place where they are written and read. Plain torch."""

from __future__ import annotations

from torch import Tensor

from thalweg.kernels.arguments import Packing, StoredRows
from thalweg.kernels.reference import quantize


def store_rows(stored: StoredRows, slots: Tensor, rows: Tensor) -> None:
    kept = slots >= 0
    stored.data.index_copy_(0, slots[kept], _packed(stored, rows[kept]))


def read_rows(stored: StoredRows, slots: Tensor) -> Tensor:
    raw, width = stored.data[slots], stored.width
    match stored.packing:
        case Packing.PLAIN:
            return raw.float()
        case Packing.FP8_KV:
            return quantize.unpack_kv(raw, width, stored.rope_dim)
        case Packing.FP8_INDEX:
            return quantize.unpack_index_fp8(raw, width)
        case Packing.FP4_INDEX:
            return quantize.unpack_index_fp4(raw, width)


def _packed(stored: StoredRows, rows: Tensor) -> Tensor:
    match stored.packing:
        case Packing.PLAIN:
            return rows.to(stored.data.dtype)
        case Packing.FP8_KV:
            return quantize.pack_kv(rows, stored.rope_dim)
        case Packing.FP8_INDEX:
            return quantize.pack_index_fp8(rows)
        case Packing.FP4_INDEX:
            return quantize.pack_index_fp4(rows)
