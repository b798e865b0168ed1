"""The bytes of all pools: one tensor per stream, allocated once at start-up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from thalweg.cache.geometry import RowKind, StreamSpec
from thalweg.errors import ConfigError
from thalweg.memory.capacity import CachePlan
from thalweg.memory.layout import RowFormat

_TORCH = {RowFormat.FLOAT32: torch.float32, RowFormat.BFLOAT16: torch.bfloat16}
_NUMPY = {torch.float32: np.float32, torch.bfloat16: np.int16}


class CacheArena:
    """Rows of every stream and layer as [slots, width] views. Slot = block * rows_per_block + row in the block."""

    def __init__(self, plan: CachePlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self._streams: dict[str, Tensor] = {}
        self._layers: dict[str, dict[int, int]] = {}
        self._blocks = {s.name: plan.pool_blocks[spec.group] for spec in plan.groups for s in spec.streams}
        for spec in plan.groups:
            for stream in spec.streams:
                slots = plan.pool_blocks[spec.group] * stream.rows_per_block
                shape = (len(stream.layers), slots, stream.width)
                self._streams[stream.name] = _zeros(shape, _dtype(stream, plan), device)
                self._layers[stream.name] = {layer: i for i, layer in enumerate(stream.layers)}

    def rows(self, stream: str, layer: int) -> Tensor:
        """The rows of a stream in a model layer, [slots, width], as a view."""
        return self._streams[stream][self._layers[stream][layer]]

    def block_bytes_view(self, stream: str, layer: int) -> Tensor:
        """The same memory as uint8 [blocks, rows_per_block * bytes of a row], whatever the format."""
        rows = self.rows(stream, layer).view(torch.uint8)
        blocks = self._blocks[stream]
        return rows.view(blocks, rows.numel() // blocks if blocks else 0)

    @property
    def allocated_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._streams.values())


def _dtype(stream: StreamSpec, plan: CachePlan) -> torch.dtype:
    if stream.kind is RowKind.STATE:
        return torch.float32
    form = plan.layout.kv if stream.kind is RowKind.KV else plan.layout.index
    if form not in _TORCH:
        raise ConfigError(f"kv_cache_dtype: pools in {form.value} are not implemented; use float32 or bfloat16")
    return _TORCH[form]


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the pages are only taken when they are first written, so a large pool costs nothing unused."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, _NUMPY[dtype])).view(dtype)
