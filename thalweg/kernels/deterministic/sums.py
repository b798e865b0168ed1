"""Sums and functions whose bits do not depend on where a value lies in its tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def folded(x: Tensor) -> Tensor:
    """The sum over axis 1, by halves: elementwise additions have no order to choose."""
    while (count := x.shape[1]) > 1:
        half = count // 2
        low = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([low, x[:, 2 * half :]], 1) if count % 2 else low
    return x[:, 0]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))
