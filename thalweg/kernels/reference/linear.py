"""Matrix products with weights, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import Weight


def pack(weight: Tensor) -> Weight:
    return Weight(weight, *weight.shape[-2:])


def linear(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x, weight.data)


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight.data.transpose(1, 2)).transpose(0, 1)
