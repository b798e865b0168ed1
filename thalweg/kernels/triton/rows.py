"""Cached rows in their byte formats, written to their slots and gathered from them in one pass.

A tile is whole rows, and a row's bytes are made of that row alone (formats.py): its company cannot matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Packing, StoredRows
from thalweg.kernels.triton import formats
from thalweg.kernels.triton.formats import PACKINGS, PLAIN, get_rows, put_rows, row_stride
from thalweg.kernels.triton.launch import Launch

TILE = 2048  # elements: 16 for each thread, enough loads in flight for full bandwidth without many registers
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def store_rows(stored: StoredRows, slots: Tensor, rows: Tensor) -> None:
    data, count = stored.data, slots.numel()
    if not count:
        return
    if torch.float64 in (rows.dtype, data.dtype):  # checks alone: torch rounds them in one step
        rows = rows.to(data.dtype if stored.packing is Packing.PLAIN else torch.float32)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    tile = _tile(stored)
    _store[(triton.cdiv(count, tile["R"]),)](
        data,
        slots.contiguous(),
        rows,
        rows.stride(0),
        count,
        stored.width,
        stored.rope_dim,
        data.shape[1],
        **tile,
        **OPTIONS,
    )


def read_rows(stored: StoredRows, slots: Tensor) -> Tensor:
    out = torch.empty((*slots.shape, stored.width), dtype=torch.float32, device=slots.device)
    tile = _tile(stored)
    if count := slots.numel():
        _read[(triton.cdiv(count, tile["R"]),)](
            stored.data, slots.contiguous(), out, count, stored.width, stored.rope_dim, **tile, **OPTIONS
        )
    return out


def _tile(stored: StoredRows) -> dict[str, int]:
    wide = formats.tile_width(stored.packing, stored.width)
    packing = PACKINGS[stored.packing]
    return {"STRIDE": row_stride(stored), "PACKING": packing, "R": max(1, TILE // wide), "W": wide}


@triton.jit
def _store(
    data,
    slots,
    rows,
    row_stride,
    count,
    width,
    rope,
    row_bytes,
    STRIDE: tl.constexpr,
    PACKING: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, W)[None, :]
    own = tl.load(slots + row, mask=row < count, other=-1)
    inside = (own >= 0)[:, None] & (column < width)
    x = tl.load(rows + row[:, None] * row_stride + column, mask=inside, other=0.0)
    if PACKING != PLAIN:
        x = x.to(tl.float32)
    put_rows(data, own, x, width, rope, row_bytes, STRIDE, PACKING, R, W)


@triton.jit
def _read(
    data,
    slots,
    out,
    count,
    width,
    rope,
    STRIDE: tl.constexpr,
    PACKING: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, W)[None, :]
    own = tl.load(slots + row, mask=row < count, other=-1)
    x = get_rows(data, own, width, rope, STRIDE, PACKING, R, W)
    tl.store(out + row[:, None] * width + column, x, mask=(row < count)[:, None] & (column < width))


def launches(config: ModelConfig) -> list[Launch]:
    state = StoredRows(torch.empty((1, 2 * config.head_dim), device="meta"), Packing.PLAIN, 2 * config.head_dim)
    made = []
    for what, stored, source in (
        ("FP8 KV rows", formats.served_kv(config), "*bf16"),
        ("FP4 index keys", formats.served_index(config), "*bf16"),
        ("compressor state", state, "*fp32"),
    ):
        pool = "*fp32" if stored is state else "*u8"
        own = {"data": pool, "slots": "*i64", "count": "i32", "width": "i32", "rope": "i32"}
        for op, kernel, more in (
            ("store_rows", _store, {"rows": source, "row_stride": "i32", "row_bytes": "i32"}),
            ("read_rows", _read, {"out": "*fp32"}),
        ):
            types, aligned = own | more, ("width", "rope", "row_stride")
            made.append(Launch(op, f"{what} of {stored.width}", kernel, types, _tile(stored), OPTIONS, aligned=aligned))
    return made
