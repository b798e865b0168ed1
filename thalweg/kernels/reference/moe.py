"""Routing and experts, plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import Weight


def route(logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    return routed(F.softplus(logits).sqrt(), bias, chosen, k, scale)


def routed(scores: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Experts and weights from scores [T, experts]."""
    if chosen is None:
        ranked = scores if bias is None else scores + bias
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) * scale


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weight, down: Weight, limit: float) -> Tensor:
    """Each token's sum runs over its experts in ascending order."""
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, token, weight in by_expert(ids, weights, len(gate_up.data)):
        gate, up = F.linear(x[token], gate_up.data[expert]).chunk(2, -1)
        hidden = swiglu(gate, up, limit) * weight
        result.index_add_(0, token, F.linear(hidden.to(x.dtype), down.data[expert]).float())
    return result


def by_expert(ids: Tensor, weights: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each of `count` experts that somebody chose, ascending: its number, its tokens and their weights [n, 1]."""
    order = ids.flatten().argsort(stable=True)
    begin = 0
    for expert, tokens in enumerate(torch.bincount(ids.flatten(), minlength=count).tolist()):
        picked = order[begin : begin + tokens]
        begin += tokens
        if tokens:
            yield expert, picked // ids.shape[1], weights.flatten()[picked].unsqueeze(-1)
