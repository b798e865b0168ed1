"""Mixture of experts: routing, routed experts and the shared expert (model-spec section 3.8)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import joined
from thalweg.kernels.ops import Kernels
from thalweg.model.weights import Weights


class MixtureOfExperts:
    """The first `num_hash_layers` layers choose experts by token id, the others by score plus bias."""

    def __init__(self, weights: Weights, config: ModelConfig, *, hashed: bool, kernels: Kernels) -> None:
        self._gate = weights.matrix("gate.weight")
        self._bias = None if hashed else weights["gate.bias"]
        self._by_token = weights["gate.tid2eid"] if hashed else None
        gate_up, down = weights.take_matrix("experts.gate_up"), weights.take_matrix("experts.down")
        w1, w2, w3 = (weights.take_matrix(f"shared_experts.{w}.weight") for w in ("w1", "w2", "w3"))
        # A shared expert of the width and the form of the others is one of them, which every token has.
        alike = len({matrix.data.dtype for matrix in (gate_up, down, w1, w2, w3)}) == 1
        self._joined = len(gate_up.data) if alike and w2.data.shape == down.data.shape[1:] else None
        if self._joined is not None:
            gate_up = joined([gate_up, joined([w1, w3]).unflatten(0, (1, -1))])
            down = joined([down, w2.unflatten(0, (1, -1))])
        else:
            self._w1, self._w2, self._w3 = weights.packed(w1), weights.packed(w2), weights.packed(w3)
        self._gate_up, self._down = weights.packed(gate_up), weights.packed(down)
        self._config = config
        self._kernels = kernels

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [T, D] -> [T, D]; token_ids [T] are read by hash layers."""
        config, kernels = self._config, self._kernels
        chosen = None if self._by_token is None else self._by_token[token_ids]
        logits = kernels.linear(x.float(), self._gate)
        ids, weights = kernels.route(logits, self._bias, chosen, config.experts_per_token, config.routed_scaling_factor)
        limit = config.swiglu_limit
        if self._joined is not None:
            ids, weights = F.pad(ids, (0, 1), value=self._joined), F.pad(weights, (0, 1), value=1.0)
            return kernels.experts(x, ids, weights, self._gate_up, self._down, limit).to(x.dtype)
        routed = kernels.experts(x, ids, weights, self._gate_up, self._down, limit)
        hidden = kernels.swiglu(kernels.linear(x, self._w1), kernels.linear(x, self._w3), limit)
        return (routed + kernels.linear(hidden.to(x.dtype), self._w2).float()).to(x.dtype)
