"""Rotary embedding of the last channels, alone and in one pass with a norm before it or a cast after it.

Every pair is turned by itself, and a tile holds whole rows where they are normed too: company cannot matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.norm import norm_tile, normed

TILE = 1024  # pairs: 8 for each thread
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = _three_axes(x)
    if rows is None:
        for part in x.unbind(1):
            rotate(part, cos, sin)
        return x
    tokens, heads, width = rows.shape
    pairs = cos.shape[1]
    tile = _tile(pairs)
    if count := tokens * heads:
        _rotate[(triton.cdiv(count, tile["R"]),)](
            rows[..., width - 2 * pairs :], cos.contiguous(), sin.contiguous(), count, heads, pairs, *rows.stride(),
            **tile, **OPTIONS,
        )  # fmt: skip
    return x


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    weight = None if weight is None else weight.contiguous()
    return _turned(x.contiguous(), x.dtype, cos, sin, weight=weight, eps=eps)


def rotate_to(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """In place where the dtype stays: an eighth of the bytes."""
    return rotate(x, cos, sin) if x.dtype is dtype else _turned(x.contiguous(), dtype, cos, sin)


def _turned(
    x: Tensor, dtype: torch.dtype, cos: Tensor, sin: Tensor, *, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Rows turned, before that normed if there is an `eps`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width, pairs = x.shape[-1], cos.shape[1]
    tile, options = turned_tile(width, pairs)
    if count := x.numel() // width:
        _turn_rows[(triton.cdiv(count, tile["R"]),)](
            x, weight, out, cos.contiguous(), sin.contiguous(), count, count // x.shape[0], width, pairs, eps,
            **tile, **options,
        )  # fmt: skip
    return out


def turned_tile(width: int, pairs: int) -> tuple[dict[str, int], dict[str, int]]:
    """Rows and columns of a tile, and its options. SHIFT puts the first of each pair into an even column."""
    shift = (width - 2 * pairs) % 2
    tile, options = norm_tile(width, shift)
    return tile | {"SHIFT": shift}, options


def _three_axes(x: Tensor) -> Tensor | None:
    """x as [T, heads, d] in the same memory; None where its strides forbid that."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    for axis in range(1, x.dim() - 2):
        if x.stride(axis) != x.stride(axis + 1) * x.shape[axis + 1]:
            return None
    return (
        x
        if x.dim() == 3 or not x.numel()
        else x.as_strided((x.shape[0], x.shape[1:-1].numel(), x.shape[-1]), (x.stride(0), x.stride(-2), x.stride(-1)))
    )


def _tile(pairs: int) -> dict[str, int]:
    wide = triton.next_power_of_2(pairs)
    return {"R": max(1, TILE // wide), "P": wide}


@triton.jit
def turned(a, b, c, s):
    """Pairs turned by their angles."""
    return a * c - b * s, a * s + b * c


@triton.jit
def _rotate(x, cos, sin, count, heads, pairs, token_stride, head_stride, stride, R: tl.constexpr, P: tl.constexpr):
    """x: the first of the rotated channels of the first row."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    token, head = row // heads, row % heads
    channel, pair = tl.arange(0, 2 * P)[None, :], tl.arange(0, P)[None, :]
    live = (row < count)[:, None]
    place = x + token[:, None] * token_stride + head[:, None] * head_stride + channel * stride
    inside = live & (channel < 2 * pairs)
    a, b = tl.split(tl.reshape(tl.load(place, mask=inside, other=0.0).to(tl.float32), [R, P, 2]))
    angle = token[:, None] * pairs + pair
    c = tl.load(cos + angle, mask=live & (pair < pairs), other=0.0)
    s = tl.load(sin + angle, mask=live & (pair < pairs), other=0.0)
    a, b = turned(a, b, c, s)
    tl.store(place, tl.reshape(tl.join(a, b), [R, 2 * P]).to(x.dtype.element_ty), mask=inside)


@triton.jit
def turn_tile(y, cos, sin, row, live, width, pairs, R: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
    """Rows y fp32 [R, W], channel c in column c + SHIFT, with their last channels turned by angles of `row` [R]."""
    a, b = tl.split(tl.reshape(y, [R, W // 2, 2]))
    pair = tl.arange(0, W // 2)[None, :] - (width - 2 * pairs + SHIFT) // 2
    inside = live[:, None] & (pair >= 0) & (pair < pairs)
    c = tl.load(cos + row[:, None] * pairs + pair, mask=inside, other=1.0)
    s = tl.load(sin + row[:, None] * pairs + pair, mask=inside, other=0.0)
    turned_a, turned_b = turned(a, b, c, s)
    pairs_now = tl.join(tl.where(inside, turned_a, a), tl.where(inside, turned_b, b))
    return tl.reshape(pairs_now, [R, W])


@triton.jit
def _turn_rows(
    x,
    weight,
    out,
    cos,
    sin,
    count,
    heads,
    width,
    pairs,
    eps,
    R: tl.constexpr,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """What is normed is rounded to the result's dtype before it is turned, as two ops would."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, W) - SHIFT
    live, held = row < count, (column >= 0) & (column < width)
    inside = live[:, None] & held[None, :]
    place = row[:, None] * width + column[None, :]
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if eps is not None:
        y = normed(y, width, eps)
        if weight is not None:
            y *= tl.load(weight + column, mask=held, other=0.0).to(tl.float32)[None, :]
        y = y.to(out.dtype.element_ty).to(tl.float32)
    y = turn_tile(y, cos, sin, row // heads, live, width, pairs, R, W, SHIFT)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def launches(config: ModelConfig) -> list[Launch]:
    pairs = config.rope_dim // 2
    angles = {"cos": "*fp32", "sin": "*fp32"}
    sizes = {"count": "i32", "heads": "i32", "pairs": "i32"}
    strides = {"token_stride": "i32", "head_stride": "i32"}
    aligned = ("count", "heads", "pairs", *strides)
    made = [
        Launch(
            "rotate", f"{config.index_heads} index heads of {config.index_head_dim}", _rotate,
            {"x": "*bf16"} | angles | sizes | strides, {"stride": 1} | _tile(pairs), OPTIONS, aligned=aligned,
        )
    ]  # fmt: skip
    tile, options = turned_tile(config.head_dim, pairs)
    heads = f"{config.num_attention_heads} heads of {config.head_dim}"
    eps: dict[str, str] = {"eps": "fp32"}
    for op, what, source, weight, norm in (
        ("norm_rotate", heads, "*bf16", {}, eps),
        ("norm_rotate", f"KV row of {config.head_dim}", "*bf16", {"weight": "*bf16"}, eps),
        ("rotate_to", heads, "*fp32", {}, {}),
    ):
        types = {"x": source, "out": "*bf16"} | angles | sizes | {"width": "i32"} | weight | norm
        absent = {name: None for name in ("weight", "eps") if name not in types}
        made.append(Launch(op, what, _turn_rows, types, absent | tile, options, aligned=("width", "pairs", "heads")))
    return made
