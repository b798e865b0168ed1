"""Routing and experts."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Weight
from thalweg.kernels.cpu.library import Library
from thalweg.kernels.cpu.linear import linear
from thalweg.kernels.deterministic.moe import swiglu
from thalweg.kernels.reference.moe import by_expert


def experts(
    library: Library, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weight, down: Weight, limit: float
) -> Tensor:
    result = torch.zeros(x.shape, dtype=torch.float32)
    for expert, token, weight in by_expert(ids, weights, len(gate_up.data)):
        both = linear(library, x[token], Weight(gate_up.data[expert], gate_up.outputs, gate_up.width))
        gate, up = both.chunk(2, -1)
        hidden = swiglu(gate, up, limit) * weight
        result.index_add_(0, token, linear(library, hidden, Weight(down.data[expert], down.outputs, down.width)))
    return result
