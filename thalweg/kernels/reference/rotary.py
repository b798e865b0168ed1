"""Rotary embedding of the last channels, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = 2 * cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[-1],)
    c, s = cos.view(shape), sin.view(shape)
    turned = x[..., -r:].float().unflatten(-1, (-1, 2))
    a, b = turned[..., 0], turned[..., 1]
    x[..., -r:] = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    return x
