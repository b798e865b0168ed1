"""How a model computes and in what form its cache rows are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError
from thalweg.kernels.ops import Kernels


@dataclass(frozen=True, slots=True)
class Numerics:
    """`compute` is the dtype of weights and activations, `cache` that of KV rows and index keys. With
    `simulate_quantization` KV rows are rounded as FP8 storage rounds them and index queries and keys go through a
    Hadamard rotation and FP4, as the released models were trained (model-spec section 5)."""

    compute: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32
    simulate_quantization: bool = False

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if the simulation does not fit the model's dims."""
        size = config.index_head_dim
        if self.simulate_quantization and size & (size - 1):
            raise ConfigError(
                f"quantization_simulation rotates by Hadamard: index_head_dim must be a power of two, not {size}",
                param="quantization_simulation",
            )

    def stored_kv(self, rows: Tensor, rope_dim: int, kernels: Kernels) -> Tensor:
        """KV rows in the form in which they are cached: what is attended is what is stored."""
        if self.simulate_quantization:
            rows = kernels.round_kv(rows, rope_dim)
        return rows.to(self.cache)

    def stored_index(self, keys: Tensor, kernels: Kernels) -> Tensor:
        """Index keys in the form in which they are cached."""
        return self.index_query(keys, kernels).to(self.cache)

    def index_query(self, query: Tensor, kernels: Kernels) -> Tensor:
        return kernels.round_index(query) if self.simulate_quantization else query
