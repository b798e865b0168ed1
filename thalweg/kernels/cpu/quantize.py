"""Rounding to the byte formats of cache rows: what packing and reading back would give."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Packing
from thalweg.kernels.cpu.library import Library, address, wide

FORMATS = {Packing.FP8_KV: 2, Packing.FP8_INDEX: 3, Packing.FP4_INDEX: 4}  # as in native/quantize.cpp


def round_kv(library: Library, rows: Tensor, rope_dim: int) -> Tensor:
    return _like(rows, _rounded(library, rows, Packing.FP8_KV, rope_dim))


def round_index(library: Library, x: Tensor) -> Tensor:
    size = x.shape[-1]
    assert size & (size - 1) == 0, "the Hadamard rotation is one of a power of two"
    return _like(x, _rounded(library, x, Packing.FP4_INDEX, 0))


def round_index_fp8(library: Library, keys: Tensor) -> Tensor:
    return _rounded(library, keys, Packing.FP8_INDEX, 0)


def _rounded(library: Library, rows: Tensor, packing: Packing, rope_dim: int) -> Tensor:
    rows, width = wide(rows), rows.shape[-1]
    out = torch.empty(rows.shape)
    if count := rows.numel():
        library.round_rows(
            address(rows), count // width, FORMATS[packing], width, rope_dim, address(out), library.threads
        )
    return out


def _like(rows: Tensor, rounded: Tensor) -> Tensor:
    return rounded if rows.dtype is torch.float32 else rounded.to(rows.dtype)
