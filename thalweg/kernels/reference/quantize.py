"""Simulation of the stored formats: values are rounded as storage would, and stay in their dtype. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0


def round_kv(rows: Tensor, rope_dim: int) -> Tensor:
    plain, turned = rows[..., :-rope_dim], rows[..., -rope_dim:]
    padding = -plain.shape[-1] % 64
    blocks = F.pad(plain.float(), (0, padding)).unflatten(-1, (-1, 64))
    scale = power_of_two(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / _E4M3_MAX)
    rounded = (blocks / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    return torch.cat([rounded.flatten(-2)[..., : plain.shape[-1]].to(rows.dtype), turned], -1)


def round_index(x: Tensor) -> Tensor:
    blocks = hadamard(x.float()).unflatten(-1, (-1, min(32, x.shape[-1])))
    scale = power_of_two(blocks.abs().amax(-1, keepdim=True).clamp_min(_E2M1_MAX * 2.0**-126) / _E2M1_MAX)
    return (e2m1(blocks / scale) * scale).flatten(-2).to(x.dtype)


def power_of_two(x: Tensor) -> Tensor:
    """2 ** ceil(log2(x)) for positive x, exactly."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def hadamard(x: Tensor) -> Tensor:
    """The normalised Walsh-Hadamard transform of the last axis, whose size is a power of two."""
    size, step = x.shape[-1], 1
    while step < size:
        pairs = x.unflatten(-1, (-1, 2, step))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        step *= 2
    return x * size**-0.5


def e2m1(x: Tensor) -> Tensor:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of x; ties go to the even code."""
    a = x.abs()
    code = (a > 0.25).int() + (a >= 0.75).int() + (a > 1.25).int() + (a >= 1.75).int()
    code = code + (a > 2.5).int() + (a >= 3.5).int() + (a > 5.0).int()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    return values[code.long()].copysign(x)
