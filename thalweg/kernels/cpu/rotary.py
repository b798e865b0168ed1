"""Rotary embedding of the last channels."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.cpu.norm import rms_norm
from thalweg.kernels.reference import rotary


def rotate(library: Library, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype is not torch.float32 or not x.is_contiguous():
        return rotary.rotate(x, cos, sin)
    cos, sin = wide(cos), wide(sin)
    tokens, width = x.shape[0], x.shape[-1]
    heads = x.numel() // max(1, tokens * width)
    library.rotate(address(x), address(cos), address(sin), tokens, heads, width, cos.shape[1], library.threads)
    return x


def norm_rotate(library: Library, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(library, rms_norm(library, x, weight, eps), cos, sin)


def rotate_to(library: Library, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    return rotate(library, x, cos, sin).to(dtype)
