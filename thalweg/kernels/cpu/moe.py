"""Routing and experts."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Weight
from thalweg.kernels.cpu.library import Library, address, wide


def route(
    library: Library, logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    logits = wide(logits)
    bias = None if bias is None else wide(bias)
    ids = torch.empty((tokens, k), dtype=torch.int64) if chosen is None else chosen.contiguous()
    weights = torch.empty(ids.shape)
    library.route(
        address(logits), address(bias), tokens, experts, ids.shape[1], scale, chosen is not None, address(ids),
        address(weights), library.threads,
    )  # fmt: skip
    return ids, weights


def swiglu(library: Library, gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = wide(gate), wide(up)
    out = torch.empty(gate.shape)
    library.swiglu(address(gate), address(up), gate.numel(), limit, address(out), library.threads)
    return out


def experts(
    library: Library, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weight, down: Weight, limit: float
) -> Tensor:
    """Tokens are sorted by expert inside; each token's sum runs over its experts in ascending order."""
    x, ids, weights = wide(x), ids.contiguous(), wide(weights)
    out = torch.empty(x.shape)
    up, back = gate_up.data, down.data
    library.experts(
        address(x), address(ids), address(weights), ids.shape[0], ids.shape[1], len(up), address(up),
        up.dtype is torch.bfloat16, address(back), back.dtype is torch.bfloat16, gate_up.width, down.width, limit,
        address(out), library.threads,
    )  # fmt: skip
    return out
