"""Routing and experts, with products of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Weight
from thalweg.kernels.deterministic.linear import product
from thalweg.kernels.deterministic.sums import sigmoid, softplus
from thalweg.kernels.reference.moe import by_expert, routed


def route(logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    return routed(softplus(logits).sqrt(), bias, chosen, k, scale)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate = gate.float().clamp(max=limit)
    return gate * sigmoid(gate) * up.float().clamp(-limit, limit)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weight, down: Weight, limit: float) -> Tensor:
    """Each token's sum runs over its experts in ascending order."""
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, token, weight in by_expert(ids, weights, len(gate_up.data)):
        gate, up = product(x[token], gate_up.data[expert]).chunk(2, -1)
        hidden = swiglu(gate, up, limit) * weight
        result.index_add_(0, token, product(hidden.to(x.dtype), down.data[expert]).float())
    return result
