"""Manifold-constrained hyper-connections (mHC), with products of fixed shape and sums over streams written out."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Weight
from thalweg.kernels.deterministic.linear import linear
from thalweg.kernels.deterministic.sums import folded, sigmoid
from thalweg.kernels.reference.hyper_connection import doubly_stochastic


def _projected(streams: Tensor, fn: Weight, norm_eps: float) -> Tensor:
    """z = (fn . v) / rms(v). The mean goes over each stream first: torch splits a sum that has only one result."""
    v = streams.flatten(1).float()
    mean_square = v.square().view(streams.shape).mean(-1).mean(-1, keepdim=True)
    return linear(v, fn) * torch.rsqrt(mean_square + norm_eps)


def _collapsed(streams: Tensor, pre: Tensor) -> Tensor:
    return folded(pre.unsqueeze(-1) * streams.float()).to(streams.dtype)


def mix_in(
    streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    z = _projected(streams, fn, norm_eps)
    pre = sigmoid(z[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = doubly_stochastic((z[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), eps, iterations)
    return _collapsed(streams, pre), post, comb


def mix_out(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = post.unsqueeze(-1) * y.float().unsqueeze(1)
    for weights, stream in zip(comb.unbind(1), streams.float().unbind(1), strict=True):
        mixed = mixed + weights.unsqueeze(-1) * stream.unsqueeze(1)
    return mixed.to(streams.dtype)


def mix_head(streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    return _collapsed(streams, sigmoid(_projected(streams, fn, norm_eps) * scale + base) + eps)
