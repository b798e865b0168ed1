"""Gated pooling of tokens into compressed entries, alone and in one pass down to the bytes of the cache.

A program makes an entry, or some channels of one, and takes its tokens in tiles of fixed size and in order: an entry's
bits depend on its own tokens alone. Only tokens that an entry pools are read. Rounding follows, so nothing is
contracted (formats.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import EntryTarget, Packing, RowRounding, TokenRows, Windows
from thalweg.kernels.triton.formats import (
    PACKINGS,
    hadamard,
    put_rows,
    round_fp4_tile,
    round_fp8_tile,
    round_kv_tile,
    row_stride,
    served_index,
    served_kv,
    tile_width,
)
from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.norm import normed
from thalweg.kernels.triton.rotary import turn_tile

TILE, MOST_TOKENS = 4096, 16  # values of a tile of tokens, and as many gates: 16 of each for a thread of eight warps
CHANNELS = 128  # of one program that only pools
STAGES = 3  # tiles of tokens on their way: a program alone must keep its multiprocessor's loads going
ROUNDINGS = {RowRounding.NONE: 0, RowRounding.KV: 1, RowRounding.INDEX: 2, RowRounding.INDEX_FP8: 3}
_KV, _INDEX, _INDEX_FP8 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def compress(rows: Tensor, own: Tensor, previous_rows: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
    entries, tokens = own.shape
    dim = rows.shape[1] // 2
    out = torch.empty((entries, dim), dtype=torch.float32, device=rows.device)
    if entries:
        tile = _token_tile(tokens, CHANNELS) | {"C": CHANNELS}
        before = None if previous_rows is None else previous_rows.contiguous()
        _compress[(entries, triton.cdiv(dim, CHANNELS))](
            rows.contiguous(), own.contiguous(), before, None if previous is None else previous.contiguous(),
            out, tokens, dim, **tile, **OPTIONS,
        )  # fmt: skip
    return out


def insert_entries(windows: Windows, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, target: EntryTarget) -> None:
    entries, tokens = windows.own.shape
    if not entries:
        return
    stored, pairs = target.stored, cos.shape[1]
    previous = windows.previous if windows.rows_before is not None else None
    _insert[(entries,)](
        *_pointers(windows.rows), windows.own.contiguous(), *_pointers(windows.rows_before),
        None if previous is None else previous.contiguous(), weight.contiguous(), cos.contiguous(), sin.contiguous(),
        stored.data, target.slots.contiguous(), tokens, stored.width, pairs, eps, stored.rope_dim,
        stored.data.shape[1], **_insert_tile(target, tokens, pairs), **OPTIONS,
    )  # fmt: skip


def _pointers(rows: TokenRows | None) -> tuple[Any, ...]:
    """Cached and new rows with the elements from row to row, and which of the former there are."""
    if rows is None:
        return None, 0, None, 0, None, 0
    assert rows.cached.stride(1) == rows.new.stride(1) == 1, "elements of a token's row lie beside each other"
    return rows.cached, rows.cached.stride(0), rows.slots.contiguous(), len(rows.slots), rows.new, rows.new.stride(0)


def _insert_tile(target: EntryTarget, tokens: int, pairs: int) -> dict[str, Any]:
    stored = target.stored
    width, shift = stored.width, stored.width % 2  # pairs end where the row does
    blocks = Packing.FP8_KV if target.rounding is RowRounding.KV else stored.packing
    wide = tile_width(blocks, width + shift)
    return {
        "STRIDE": row_stride(stored),
        "PACKING": PACKINGS[stored.packing],
        "ROUNDING": ROUNDINGS[target.rounding],
        "STEPS": width.bit_length() - 1,
        "FACTOR": width**-0.5,
        "W": wide,
        "SHIFT": shift,
    } | _token_tile(tokens, wide)


def _token_tile(tokens: int, channels: int) -> dict[str, int]:
    most = max(1, min(triton.next_power_of_2(tokens), TILE // channels, MOST_TOKENS))
    return {"TOKENS": most, "STAGES": STAGES if tokens > most else 1}


@triton.jit
def _taken(cached, cached_stride, slots, count, new, new_stride, index, live, column, inside):
    """Some columns of the tokens `index` [TOKENS]: the first `count` are cached, the rest new."""
    late = live & (index >= count)
    place = new + (index - count)[:, None] * new_stride + column[None, :]
    taken = tl.load(place, mask=late[:, None] & inside[None, :], other=0.0)
    if cached is not None:
        early = live & (index < count)
        slot = tl.load(slots + index, mask=early, other=0)
        old = cached + slot[:, None] * cached_stride + column[None, :]
        kept = tl.load(old, mask=early[:, None] & inside[None, :], other=0.0)
        taken = tl.where(early[:, None], kept, taken)
    return taken


@triton.jit
def _pool(
    cached,
    cached_stride,
    slots,
    count,
    new,
    new_stride,
    chosen,
    tokens,
    column,
    inside,
    dim,
    top,
    total,
    weight,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take `chosen` tokens (below 0: none) into a softmax over them: its highest gate, sums of weighted values and of
    weights, each [C]."""
    for begin in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        token = begin + tl.arange(0, TOKENS)
        index = tl.load(chosen + token, mask=token < tokens, other=-1)
        live = index >= 0
        value = _taken(cached, cached_stride, slots, count, new, new_stride, index, live, column, inside)
        gate = _taken(cached, cached_stride, slots, count, new, new_stride, index, live, dim + column, inside)
        gate = tl.where(live[:, None], gate, float("-inf"))
        higher = tl.maximum(top, tl.max(gate, 0))
        faded, by = tl.exp(top - higher), tl.exp(gate - higher[None, :])
        total = total * faded + tl.sum(by * value, 0)
        weight = weight * faded + tl.sum(by, 0)
        top = higher
    return top, total, weight


@triton.jit
def _compress(
    rows, own, rows_before, previous, out, tokens, dim, TOKENS: tl.constexpr, STAGES: tl.constexpr, C: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < dim
    top, none = tl.full([C], float("-inf"), tl.float32), tl.zeros([C], tl.float32)
    chosen = own + entry * tokens
    top, total, weight = _pool(
        None, 0, None, 0, rows, 2 * dim, chosen, tokens, column, inside, dim, top, none, none, TOKENS, STAGES
    )
    if previous is not None:
        chosen = previous + entry * tokens
        top, total, weight = _pool(
            None,
            0,
            None,
            0,
            rows_before,
            2 * dim,
            chosen,
            tokens,
            column,
            inside,
            dim,
            top,
            total,
            weight,
            TOKENS,
            STAGES,
        )
    tl.store(out + entry * dim + column, total / weight, mask=inside)


@triton.jit
def _insert(
    cached,
    cached_stride,
    cached_slots,
    count,
    new,
    new_stride,
    own,
    cached_before,
    cached_before_stride,
    cached_before_slots,
    count_before,
    new_before,
    new_before_stride,
    previous,
    weight,
    cos,
    sin,
    data,
    slots,
    tokens,
    dim,
    pairs,
    eps,
    rope,
    row_bytes,
    STRIDE: tl.constexpr,
    PACKING: tl.constexpr,
    ROUNDING: tl.constexpr,
    STEPS: tl.constexpr,
    FACTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One entry, channel c in column c + SHIFT until it is turned."""
    entry = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + entry)
    if slot < 0:
        return
    column = tl.arange(0, W) - SHIFT
    inside = (column >= 0) & (column < dim)
    top, none = tl.full([W], float("-inf"), tl.float32), tl.zeros([W], tl.float32)
    top, total, by = _pool(
        cached, cached_stride, cached_slots, count, new, new_stride, own + entry * tokens, tokens, column, inside, dim,
        top, none, none, TOKENS, STAGES,
    )  # fmt: skip
    if previous is not None:
        top, total, by = _pool(
            cached_before, cached_before_stride, cached_before_slots, count_before, new_before, new_before_stride,
            previous + entry * tokens, tokens, column, inside, dim, top, total, by, TOKENS, STAGES,
        )  # fmt: skip
    kind = weight.dtype.element_ty
    y = tl.where(inside, total / by, 0.0).to(kind).to(tl.float32)[None, :]
    y = normed(y, dim, eps) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    row = entry + tl.zeros([1], tl.int64)
    y = turn_tile(y.to(kind).to(tl.float32), cos, sin, row, row >= 0, dim, pairs, 1, W, SHIFT).to(kind)
    at = tl.arange(0, W)[None, :]
    if SHIFT > 0:
        y = tl.where(at < dim, tl.gather(y, tl.minimum(at + SHIFT, W - 1), 1), 0.0)
    if ROUNDING == _KV:
        y = round_kv_tile(y.to(tl.float32), at, dim - rope, 1, W).to(kind)
    elif ROUNDING == _INDEX:
        y = round_fp4_tile(hadamard(y.to(tl.float32), 1, W, STEPS, FACTOR), 1, W).to(kind)
    elif ROUNDING == _INDEX_FP8:
        y = round_fp8_tile(y.to(tl.float32))
    put_rows(data, slot + tl.zeros([1], tl.int64), y.to(tl.float32), dim, rope, row_bytes, STRIDE, PACKING, 1, W)


def launches(config: ModelConfig) -> list[Launch]:
    pool = {"rows": "*fp32", "own": "*i64", "out": "*fp32", "tokens": "i32", "dim": "i32"}
    made = []
    for name, ratio, overlap in (("CSA", config.csa_ratio, True), ("HCA", config.hca_ratio, False)):
        tile = _token_tile(ratio, CHANNELS) | {"C": CHANNELS}
        before = {"rows_before": "*fp32", "previous": "*i64"} if overlap else {}
        absent = {} if overlap else {"rows_before": None, "previous": None}
        what = f"{name}, {ratio} tokens of {config.head_dim}"
        made.append(Launch("compress", what, _compress, pool | before, absent | tile, OPTIONS, aligned=("dim",)))
        made.append(_insert_launch(config, what, EntryTarget(served_kv(config), torch.empty(0), RowRounding.KV), ratio))
    keys = EntryTarget(served_index(config), torch.empty(0), RowRounding.INDEX)
    what = f"index keys, {config.csa_ratio} tokens of {config.index_head_dim}"
    return [*made, _insert_launch(config, what, keys, config.csa_ratio)]


def _insert_launch(config: ModelConfig, what: str, target: EntryTarget, ratio: int) -> Launch:
    """Windows overlap in CSA layers alone."""
    own = {"cached": "*fp32", "cached_stride": "i32", "cached_slots": "*i64", "count": "i32"}
    own |= {"new": "*fp32", "new_stride": "i32", "own": "*i64"}
    before = {"cached_before": "*fp32", "cached_before_stride": "i32", "cached_before_slots": "*i64"}
    before |= {"count_before": "i32", "new_before": "*fp32", "new_before_stride": "i32", "previous": "*i64"}
    absent: dict[str, Any] = {}
    if ratio != config.csa_ratio:
        absent = {name: None if kind.startswith("*") else 0 for name, kind in before.items()}
    rest = {"weight": "*bf16", "cos": "*fp32", "sin": "*fp32", "data": "*u8", "slots": "*i64", "tokens": "i32"}
    rest |= {"dim": "i32", "pairs": "i32", "eps": "fp32", "rope": "i32", "row_bytes": "i32"}
    types = own | {name: kind for name, kind in before.items() if name not in absent} | rest
    tile = _insert_tile(target, ratio, config.rope_dim // 2)
    aligned = ("cached_stride", "new_stride", "cached_before_stride", "new_before_stride", "dim", "pairs", "rope")
    return Launch("insert_entries", what, _insert, types, absent | tile, OPTIONS, aligned=aligned)
