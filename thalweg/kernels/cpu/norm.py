"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.reference import norm


def rms_norm(library: Library, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.dtype is not torch.float32:
        return norm.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty(x.shape)
    weight = None if weight is None else wide(weight)
    width = x.shape[-1]
    library.rms_norm(address(x), address(weight), x.numel() // width, width, eps, address(out), library.threads)
    return out
