"""Manifold-constrained hyper-connections (mHC)."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Weight
from thalweg.kernels.cpu.library import Library
from thalweg.kernels.cpu.linear import linear
from thalweg.kernels.deterministic.hyper_connection import _collapsed
from thalweg.kernels.deterministic.sums import sigmoid
from thalweg.kernels.reference.hyper_connection import doubly_stochastic


def _projected(library: Library, streams: Tensor, fn: Weight, norm_eps: float) -> Tensor:
    v = streams.flatten(1).float()
    mean_square = v.square().view(streams.shape).mean(-1).mean(-1, keepdim=True)
    return linear(library, v, fn) * torch.rsqrt(mean_square + norm_eps)


def mix_in(
    library: Library,
    streams: Tensor,
    fn: Weight,
    base: Tensor,
    scale: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    z = _projected(library, streams, fn, norm_eps)
    pre = sigmoid(z[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = doubly_stochastic((z[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), eps, iterations)
    return _collapsed(streams, pre), post, comb


def mix_head(
    library: Library, streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float
) -> Tensor:
    return _collapsed(streams, sigmoid(_projected(library, streams, fn, norm_eps) * scale + base) + eps)
