"""FP8 and FP4 weight formats of the official checkpoints, both ways (model-spec section 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FP8_BLOCK = 128
FP4_GROUP = 32
_E4M3_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [out, in] times e8m0 [ceil(out/128), ceil(in/128)] -> fp32 [out, in]."""
    rows, columns = weight.shape
    spread = exponents(scale).repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight.to(torch.float32) * spread


def dequantize_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in/2] (low nibble: even column) times e8m0 [out, in/32] -> fp32 [out, in]."""
    values = torch.tensor(_E2M1 + tuple(-v for v in _E2M1))
    codes = packed.view(torch.uint8)
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return values[pairs.long()] * exponents(scale).repeat_interleave(FP4_GROUP, 1)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out, in] -> e4m3 [out, in] and e8m0 bytes [ceil(out/128), ceil(in/128)]."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    scale = _scale_bytes(blocks.abs().amax((1, 3)) / _E4M3_MAX)
    scaled = blocks / exponents(scale)[:, None, :, None]
    return scaled.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn), scale


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out, in] -> packed int8 [out, in/2] and e8m0 bytes [out, in/32]."""
    groups = weight.unflatten(1, (-1, FP4_GROUP))
    scale = _scale_bytes(groups.abs().amax(-1) / _E2M1[-1])
    scaled = (groups / exponents(scale)[..., None]).flatten(1)
    code = (scaled.abs()[..., None] - torch.tensor(_E2M1)).abs().argmin(-1) + 8 * (scaled < 0).long()
    return (code[:, 0::2] + 16 * code[:, 1::2]).to(torch.uint8).view(torch.int8), scale


def exponents(scale: Tensor) -> Tensor:
    """e8m0 -> fp32: 2 ** (byte - 127)."""
    byte = scale.view(torch.uint8).to(torch.int32)
    return torch.ldexp(torch.ones(byte.shape), byte - _EXPONENT_BIAS)


def _scale_bytes(x: Tensor) -> Tensor:
    """The smallest power of two that is at least x, as e8m0 bytes."""
    mantissa, exponent = torch.frexp(x.clamp_min(2.0**-126))
    return (exponent - (mantissa == 0.5).to(exponent.dtype) + _EXPONENT_BIAS).to(torch.uint8)
