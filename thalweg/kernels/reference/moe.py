"""Routing and experts, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def route(logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = F.softplus(logits).sqrt()
    if chosen is None:
        ranked = scores if bias is None else scores + bias
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) * scale


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """Tokens are grouped by expert, without padding; each token's sum runs over its experts in ascending order."""
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).tolist()
    begin = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        picked = order[begin : begin + count]
        begin += count
        token = picked // ids.shape[1]
        gate, up = F.linear(x[token], gate_up[expert]).float().chunk(2, -1)
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weights.flatten()[picked].unsqueeze(-1)
        result.index_add_(0, token, F.linear(hidden.to(x.dtype), down[expert]).float())
    return result
