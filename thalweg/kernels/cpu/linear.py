"""Matrix products with weights that were packed into panels when the model was loaded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import Matrix, Quantised, Weight
from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.reference.linear import widened


def pack(library: Library, weight: Matrix) -> Weight:
    """Panels [..., panels, K, 2 * lanes], the last one filled up with zeros. bfloat16 stays bfloat16, column i beside
    column lanes + i, and so does what is exact in it; anything else becomes fp32."""
    weight = widened(weight).bfloat16() if isinstance(weight, Quantised) else weight
    lanes = library.lanes
    rows = F.pad(weight, (0, 0, 0, -weight.shape[-2] % (2 * lanes))).unflatten(-2, (-1, 2, lanes))
    if weight.dtype is torch.bfloat16:
        panels = rows.transpose(-1, -3).flatten(-2)  # [..., panels, K, lanes, 2]
    else:
        panels = rows.movedim(-1, -3).flatten(-2).float()  # [..., panels, K, 2, lanes]
    return Weight(panels.contiguous(), *weight.shape[-2:])


def linear(library: Library, x: Tensor, weight: Weight) -> Tensor:
    return _product(library, wide(x), weight, 1, (*x.shape[:-1], weight.outputs))


def grouped_linear(library: Library, x: Tensor, weight: Weight) -> Tensor:
    return _product(library, wide(x), weight, x.shape[1], (*x.shape[:-1], weight.outputs))


def _product(library: Library, x: Tensor, weight: Weight, groups: int, shape: tuple[int, ...]) -> Tensor:
    out = torch.empty(shape)
    rows = x.numel() // (weight.width * groups)
    narrow = weight.data.dtype is torch.bfloat16
    library.linear(
        address(x), rows, groups, address(weight.data), narrow, weight.outputs, weight.width, address(out),
        library.threads,
    )  # fmt: skip
    return out
