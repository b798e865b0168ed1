"""Rounding to the byte formats of cache rows: what packing and reading back would give (formats.py).

A tile is whole rows, and a row is rounded by itself: its company cannot matter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Packing
from thalweg.kernels.triton import formats
from thalweg.kernels.triton.formats import (
    FP8_INDEX,
    FP8_KV,
    PACKINGS,
    hadamard,
    round_fp4_tile,
    round_fp8_tile,
    round_kv_tile,
)
from thalweg.kernels.triton.launch import Launch

TILE = 2048  # elements: 16 for each thread
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def round_kv(rows: Tensor, rope_dim: int) -> Tensor:
    return _rounded(rows, rows.dtype, Packing.FP8_KV, rope_dim)


def round_index(x: Tensor) -> Tensor:
    size = x.shape[-1]
    assert size & (size - 1) == 0, "the Hadamard rotation is one of a power of two"
    return _rounded(x, x.dtype, Packing.FP4_INDEX, 0)


def round_index_fp8(keys: Tensor) -> Tensor:
    return _rounded(keys, torch.float32, Packing.FP8_INDEX, 0)


def _rounded(rows: Tensor, dtype: torch.dtype, packing: Packing, rope_dim: int) -> Tensor:
    rows = rows.contiguous()
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    tile, width = _tile(packing, rows.shape[-1]), rows.shape[-1]
    if count := rows.numel() // width:
        _round[(triton.cdiv(count, tile["R"]),)](rows, out, count, width, rope_dim, **tile, **OPTIONS)
    return out


def _tile(packing: Packing, width: int) -> dict[str, Any]:
    wide = formats.tile_width(packing, width)
    steps = width.bit_length() - 1
    return {
        "PACKING": PACKINGS[packing],
        "STEPS": steps,
        "FACTOR": width**-0.5,
        "R": max(1, TILE // wide),
        "W": wide,
    }


@triton.jit
def _round(
    rows,
    out,
    count,
    width,
    rope,
    PACKING: tl.constexpr,
    STEPS: tl.constexpr,
    FACTOR: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, W)[None, :]
    inside = (row < count)[:, None] & (column < width)
    x = tl.load(rows + row[:, None] * width + column, mask=inside, other=0.0).to(tl.float32)
    if PACKING == FP8_KV:
        x = round_kv_tile(x, column, width - rope, R, W)
    elif PACKING == FP8_INDEX:
        x = round_fp8_tile(x)
    else:
        x = round_fp4_tile(hadamard(x, R, W, STEPS, FACTOR), R, W)
    tl.store(out + row[:, None] * width + column, x.to(out.dtype.element_ty), mask=inside)


def launches(config: ModelConfig) -> list[Launch]:
    made = []
    for op, what, packing, width, out in (
        ("round_kv", "KV row", Packing.FP8_KV, config.head_dim, "*bf16"),
        ("round_index", "index query", Packing.FP4_INDEX, config.index_head_dim, "*bf16"),
        ("round_index_fp8", "index key", Packing.FP8_INDEX, config.index_head_dim, "*fp32"),
    ):
        types = {"rows": "*bf16", "out": out, "count": "i32", "width": "i32", "rope": "i32"}
        tile = _tile(packing, width)
        made.append(Launch(op, f"{what} of {width}", _round, types, tile, OPTIONS, aligned=("width", "rope")))
    return made
