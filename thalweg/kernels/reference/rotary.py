"""Rotary embedding of the last channels, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.reference.norm import rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = 2 * cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[-1],)
    c, s = cos.view(shape), sin.view(shape)
    turned = x[..., -r:].float().unflatten(-1, (-1, 2))
    a, b = turned[..., 0], turned[..., 1]
    x[..., -r:] = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    return x


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(rms_norm(x, weight, eps), cos, sin)


def rotate_to(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    return rotate(x, cos, sin).to(dtype)
