"""Matrix products with weights, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import FP4_GROUP, FP8_BLOCK, Matrix, Quantised, Weight

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack(weight: Matrix) -> Weight:
    plain = widened(weight) if isinstance(weight, Quantised) else weight
    return Weight(plain, *plain.shape[-2:])


def widened(weight: Quantised) -> Tensor:
    """fp32 [..., N, K]."""
    scales = torch.ldexp(torch.ones_like(weight.scales, dtype=torch.float32), weight.scales.int() - 127)
    if weight.data.dtype is torch.uint8:
        codes = torch.stack([weight.data & 15, weight.data >> 4], -1).flatten(-2).int()
        values = torch.tensor(E2M1, dtype=torch.float32, device=codes.device)[codes & 7] * (1 - codes // 8 * 2)
        return values * scales.repeat_interleave(FP4_GROUP, -1)
    down, across = scales.repeat_interleave(FP8_BLOCK, -2), weight.data.to(torch.float32)
    return across * down[..., : weight.outputs, :].repeat_interleave(FP8_BLOCK, -1)[..., : weight.width]


def linear(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x, weight.data)


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight.data.transpose(1, 2)).transpose(0, 1)
