"""Parameters by name, as a layer sees them: a view of the whole under a prefix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thalweg.checkpoint.parameters import Precision, parameters
from thalweg.config.model import ModelConfig


class Weights:
    """`weights["wq_a.weight"]` under the prefix `layers.0.attn.` is `layers.0.attn.wq_a.weight`."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def under(self, prefix: str) -> Weights:
        return Weights(self._tensors, self._prefix + prefix)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]


def allocate(config: ModelConfig, compute: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors for every parameter, for a loader to fill in place."""
    dtypes = {Precision.COMPUTE: compute, Precision.FLOAT32: torch.float32, Precision.INT64: torch.int64}
    return {p.name: torch.empty(p.shape, dtype=dtypes[p.precision], device=device) for p in parameters(config)}
