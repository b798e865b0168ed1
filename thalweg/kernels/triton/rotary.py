"""Rotary embedding of the last channels. Every pair is turned by itself: its company cannot matter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.triton.launch import Launch

TILE = 1024  # pairs: 8 for each thread
OPTIONS = {"num_warps": 4, "num_stages": 1}


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


from thalweg.kernels.reference.rotary import norm_rotate, rotate_to


def _three_axes(x: Tensor) -> Tensor | None:
    """x as [T, heads, d] in the same memory; None where its strides forbid that."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    for axis in range(1, x.dim() - 2):
        if x.stride(axis) != x.stride(axis + 1) * x.shape[axis + 1]:
            return None
    return x if x.dim() == 3 or not x.numel() else x.as_strided(
        (x.shape[0], x.shape[1:-1].numel(), x.shape[-1]), (x.stride(0), x.stride(-2), x.stride(-1))
    )


def _tile(pairs: int) -> dict[str, int]:
    wide = triton.next_power_of_2(pairs)
    return {"R": max(1, TILE // wide), "P": wide}


@triton.jit
def turned(a, b, c, s):
    """Pairs turned by their angles."""
    return a * c - b * s, a * s + b * c


@triton.jit
def _rotate(
    x, cos, sin, count, heads, pairs, token_stride, head_stride, stride, R: tl.constexpr, P: tl.constexpr
):
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


def launches(config: ModelConfig) -> list[Launch]:
    return []
