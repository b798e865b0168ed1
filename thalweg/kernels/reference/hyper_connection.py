"""Manifold-constrained hyper-connections (mHC), plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import Weight


def _projected(streams: Tensor, fn: Weight, norm_eps: float) -> Tensor:
    """z = (fn . v) / rms(v) with v the flattened streams in fp32."""
    v = streams.flatten(1).float()
    return F.linear(v, fn.data) * torch.rsqrt(v.square().mean(-1, keepdim=True) + norm_eps)


def _collapsed(streams: Tensor, pre: Tensor) -> Tensor:
    return torch.bmm(pre.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)


def mix_in(
    streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    z = _projected(streams, fn, norm_eps)
    pre = torch.sigmoid(z[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = doubly_stochastic((z[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), eps, iterations)
    return _collapsed(streams, pre), post, comb


def doubly_stochastic(logits: Tensor, eps: float, iterations: int) -> Tensor:
    """Softmax over rows, then Sinkhorn rounds [T, N, N] that end on columns."""
    comb = torch.softmax(logits, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def mix_out(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    kept = torch.bmm(comb.transpose(1, 2), streams.float())
    return (kept + post.unsqueeze(-1) * y.float().unsqueeze(1)).to(streams.dtype)


def mix_head(streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    return _collapsed(streams, torch.sigmoid(_projected(streams, fn, norm_eps) * scale + base) + eps)
