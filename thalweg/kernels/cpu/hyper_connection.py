"""Manifold-constrained hyper-connections (mHC)."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Weight
from thalweg.kernels.cpu.library import Library, address, wide

MOST_STREAMS = 16  # as many as a config may name; there is a loop for each number


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
    dtype, streams = streams.dtype, _known(streams)
    tokens, n, hidden = streams.shape
    x, post, comb = torch.empty((tokens, hidden)), torch.empty((tokens, n)), torch.empty((tokens, n, n))
    library.mix_in(
        address(streams), tokens, n, hidden, address(fn.data), fn.data.dtype is torch.bfloat16, address(base),
        address(scale), norm_eps, eps, iterations, address(x), address(post), address(comb), library.threads,
    )  # fmt: skip
    return x.to(dtype), post, comb


def mix_out(library: Library, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    dtype = streams.dtype
    y, streams, post, comb = wide(y), _known(streams), wide(post), wide(comb)
    tokens, n, hidden = streams.shape
    out = torch.empty(streams.shape)
    library.mix_out(
        address(y), address(streams), tokens, n, hidden, address(post), address(comb), address(out), library.threads
    )
    return out.to(dtype)


def mix_head(
    library: Library, streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float
) -> Tensor:
    dtype, streams = streams.dtype, _known(streams)
    tokens, n, hidden = streams.shape
    x = torch.empty((tokens, hidden))
    library.mix_head(
        address(streams), tokens, n, hidden, address(fn.data), fn.data.dtype is torch.bfloat16, address(base),
        address(scale), norm_eps, eps, address(x),
    )  # fmt: skip
    return x.to(dtype)


def _known(streams: Tensor) -> Tensor:
    assert 1 <= streams.shape[1] <= MOST_STREAMS, f"no compiled loop over {streams.shape[1]} streams"
    return wide(streams)
