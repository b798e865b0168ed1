"""RMSNorm. A tile is whole rows and its shape that of the width alone: the sum over a row has one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.triton.launch import Launch

TILE = 2048  # elements of narrow rows taken together: 16 for each thread
WIDE = 4096  # elements from which a row is given eight warps: 16 to 32 for each thread


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    tile, options = norm_tile(width)
    if count := x.numel() // width:
        weight = None if weight is None else weight.contiguous()
        _norm[(triton.cdiv(count, tile["R"]),)](x, weight, out, count, width, eps, **tile, **options)
    return out


def norm_tile(width: int, extra: int = 0) -> tuple[dict[str, int], dict[str, int]]:
    """Rows and columns of a tile, and the warps that share it. `extra`: columns besides the row's own."""
    wide = max(2, triton.next_power_of_2(width + extra))
    options = {"num_warps": 8 if wide >= WIDE else 4, "num_stages": 1, "enable_fp_fusion": True}
    return {"R": max(1, TILE // wide), "W": wide}, options


@triton.jit
def normed(x, width, eps):
    """Rows fp32 [R, W], zero from `width` on, over their root mean square."""
    mean = tl.sum(x * x, 1) / width
    return x * tl.rsqrt(mean + eps)[:, None]


@triton.jit
def _norm(x, weight, out, count, width, eps, R: tl.constexpr, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, W)
    inside = (row < count)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    y = normed(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), width, eps)
    if weight is not None:
        y *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def launches(config: ModelConfig) -> list[Launch]:
    made = []
    for name, width in (("hidden", config.hidden_size), ("low-rank query", config.q_lora_rank)):
        tile, options = norm_tile(width)
        types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "count": "i32", "width": "i32", "eps": "fp32"}
        made.append(Launch("rms_norm", f"{name} {width}", _norm, types, tile, options, aligned=("width",)))
    return made
