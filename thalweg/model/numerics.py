"""How a model computes and in what form its cache rows are kept: the one place that knows formats and roundings.

What is stored is rounded before anybody uses it, so that a row read back equals the row that its own step attended to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError
from thalweg.kernels.arguments import EntryTarget, Packing, RowRounding, StoredRows
from thalweg.kernels.ops import Kernels
from thalweg.memory.layout import RowFormat

_TORCH = {RowFormat.FLOAT32: torch.float32, RowFormat.BFLOAT16: torch.bfloat16}


class Rounding(StrEnum):
    """To which values rows are rounded, in whatever format they are kept."""

    NONE = "none"
    FP8 = "fp8"  # KV rows: e4m3 in blocks of 64, rotated channels bf16. Index keys: e4m3 with one scale per key
    FP4 = "fp4"  # index keys and queries: Hadamard rotation, then e2m1 in blocks of 32


@dataclass(frozen=True, slots=True)
class Numerics:
    """`compute` is the dtype of weights and activations; `kv` and `index` are the formats of KV rows and index keys.
    A packed format implies its rounding; wide formats may be rounded too and then give the same bits as packed ones."""

    compute: torch.dtype = torch.float32
    kv: RowFormat = RowFormat.FLOAT32
    index: RowFormat = RowFormat.FLOAT32
    kv_rounding: Rounding = Rounding.NONE
    index_rounding: Rounding = Rounding.NONE

    def __post_init__(self) -> None:
        for form, rounding in ((self.kv, self.kv_rounding), (self.index, self.index_rounding)):
            assert form in _TORCH or form.value == rounding.value, f"{form.value} holds no rows of rounding {rounding}"
        assert self.index is not RowFormat.BFLOAT16 or self.index_rounding is not Rounding.FP8, "bf16 has too few bits"

    @classmethod
    def serving(cls, compute: torch.dtype, kv: RowFormat, index: RowFormat, *, simulate: bool = False) -> Numerics:
        """The roundings that the formats imply; `simulate` rounds wide rows as FP8 KV and an FP4 index would
        (model-spec 5). Raises ConfigError for an FP8 index under simulation: it cannot hold FP4's values."""
        if simulate and index is RowFormat.FP8:
            raise ConfigError(
                "index_cache_dtype: quantization_simulation rounds index keys to FP4; keep them as fp4, bfloat16 or "
                "float32",
                param="index_cache_dtype",
            )
        kv_rounding = Rounding.FP8 if simulate or kv is RowFormat.FP8 else Rounding.NONE
        index_rounding = Rounding.FP4 if simulate else Rounding.NONE if index in _TORCH else Rounding(index.value)
        return cls(compute, kv, index, kv_rounding, index_rounding)

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if the roundings do not fit the model's dims."""
        size = config.index_head_dim
        if self.index_rounding is Rounding.FP4 and size & (size - 1):
            name = "index_cache_dtype" if self.index is RowFormat.FP4 else "quantization_simulation"
            raise ConfigError(
                f"{name}: an FP4 index is rotated by Hadamard: index_head_dim must be a power of two, not {size}",
                param=name,
            )

    def stored_kv(self, rows: Tensor, rope_dim: int, kernels: Kernels) -> Tensor:
        """KV rows with the values that the cache will hold: what is attended is what is stored."""
        if self.kv_rounding is Rounding.FP8:
            rows = kernels.round_kv(rows, rope_dim)
        return rows.to(_TORCH.get(self.kv, rows.dtype))

    def index_query(self, query: Tensor, kernels: Kernels) -> Tensor:
        """Index queries, in the space of the stored keys."""
        return kernels.round_index(query) if self.index_rounding is Rounding.FP4 else query

    def kv_target(self, data: Tensor, slots: Tensor, config: ModelConfig) -> EntryTarget:
        """New entries for `slots` of a KV stream of one layer."""
        rounding = RowRounding.KV if self.kv_rounding is Rounding.FP8 else RowRounding.NONE
        return EntryTarget(self.kv_rows(data, config), slots, rounding)

    def index_target(self, data: Tensor, slots: Tensor, config: ModelConfig) -> EntryTarget:
        """New index keys for `slots` of one layer. FP8 packing rounds by itself, and only once: the scale of rounded
        keys may differ in the last bit."""
        rounding = RowRounding.NONE
        if self.index_rounding is Rounding.FP4:
            rounding = RowRounding.INDEX
        elif self.index_rounding is Rounding.FP8 and self.index is not RowFormat.FP8:
            rounding = RowRounding.INDEX_FP8
        return EntryTarget(self.index_rows(data, config), slots, rounding)

    def kv_rows(self, data: Tensor, config: ModelConfig) -> StoredRows:
        """A KV stream of one layer as ops read and write it."""
        packing = Packing.FP8_KV if self.kv is RowFormat.FP8 else Packing.PLAIN
        return StoredRows(data, packing, config.head_dim, config.rope_dim)

    def index_rows(self, data: Tensor, config: ModelConfig) -> StoredRows:
        """Index keys of one layer as ops read and write them."""
        packing = {RowFormat.FP8: Packing.FP8_INDEX, RowFormat.FP4: Packing.FP4_INDEX}.get(self.index, Packing.PLAIN)
        return StoredRows(data, packing, config.index_head_dim)
