"""The bytes of all pools: one tensor per stream, allocated once at start-up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from thalweg.cache.geometry import StreamSpec
from thalweg.memory.capacity import CachePlan
from thalweg.memory.layout import CacheLayout, RowFormat

_TORCH = {RowFormat.FLOAT32: torch.float32, RowFormat.BFLOAT16: torch.bfloat16}
_NUMPY = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.uint8: np.uint8}


class CacheArena:
    """Rows of every stream and layer. Slot = block * rows_per_block + row in the block."""

    def __init__(self, plan: CachePlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self._streams: dict[str, Tensor] = {}
        self._layers: dict[str, dict[int, int]] = {}
        self._blocks: dict[str, int] = {}
        for spec in plan.groups:
            for stream in spec.streams:
                blocks = plan.pool_blocks[spec.group]
                width, dtype = _elements(stream, plan.layout)
                shape = (len(stream.layers), blocks * stream.rows_per_block, width)
                self._streams[stream.name] = _zeros(shape, dtype, device)
                self._layers[stream.name] = {layer: i for i, layer in enumerate(stream.layers)}
                self._blocks[stream.name] = blocks

    def rows(self, stream: str, layer: int) -> Tensor:
        """The rows of a stream in a model layer, as a view: [slots, width] of the stream's dtype, or uint8
        [slots, bytes of a row] where its format is packed."""
        return self._streams[stream][self._layers[stream][layer]]

    def block_bytes_view(self, stream: str, layer: int) -> Tensor:
        """The same memory as uint8 [blocks, rows_per_block * bytes of a row], whatever the format."""
        rows = self.rows(stream, layer).view(torch.uint8)
        blocks = self._blocks[stream]
        return rows.view(blocks, rows.numel() // blocks if blocks else 0)

    def memory(self) -> tuple[Tensor, ...]:
        """One tensor per stream, of all its layers: they stay where they are."""
        return tuple(self._streams.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._streams.values())


def _elements(stream: StreamSpec, layout: CacheLayout) -> tuple[int, torch.dtype]:
    """Elements of a row and their dtype."""
    form = layout.format_of(stream)
    return (layout.row_bytes(stream), torch.uint8) if form.packed else (stream.width, _TORCH[form])


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the pages are only taken when they are first written, so a large pool costs nothing unused."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, _NUMPY[dtype])).view(dtype)
