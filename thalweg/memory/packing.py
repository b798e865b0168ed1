"""Blocks of the pools as plain bytes: what is copied to lower tiers and back.

A unit's bytes are its blocks of the compressed groups, one group after the other; a checkpoint's are the blocks of the
sliding groups behind its boundary. A block's bytes are its rows, stream by stream and layer by layer, as they lie in
the pools: the served byte format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import checkpoint_blocks
from thalweg.memory.pages import take_pages

Bytes = npt.NDArray[np.uint8]
Blocks = Mapping[Group, Sequence[int]]
_WIDE = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


class BlockPacker:
    """Copies between the pools and host memory. May run beside a forward pass: it touches only the blocks given."""

    def __init__(self, arena: CacheArena) -> None:
        self._arena = arena
        self._layout = arena.plan.layout
        self._device = arena.device
        self._specs = {spec.group: spec for spec in arena.plan.groups}
        self._rows = tuple(spec.group for spec in arena.plan.groups if spec.compressed)
        self._state = {s.group: checkpoint_blocks(s) for s in arena.plan.groups if checkpoint_blocks(s)}

    @property
    def unit_bytes(self) -> int:
        return sum(self.block_bytes(group) for group in self._rows)

    @property
    def checkpoint_bytes(self) -> int:
        return sum(count * self.block_bytes(group) for group, count in self._state.items())

    def take_pages(self, units: int) -> None:
        """Have the memory of the blocks that so many units will be loaded to: pools give out their lowest first."""
        if self._device.type != "cpu":
            return
        for group in self._rows:
            for _, view in self._views(self._specs[group]):
                take_pages(view.data_ptr(), min(units, len(view)) * view.shape[1])

    def block_bytes(self, group: Group) -> int:
        return self._layout.block_bytes(self._specs[group])

    def pack_units(self, blocks: Blocks) -> Bytes:
        """uint8 [units, unit_bytes] of the blocks of so many units, by compressed group."""
        return _joined([self.pack(group, blocks[group]) for group in self._rows])

    def unpack_units(self, data: Bytes, blocks: Blocks) -> None:
        """The inverse of `pack_units`."""
        begin = 0
        for group in self._rows:
            size = self.block_bytes(group)
            self.unpack(group, data[:, begin : begin + size], blocks[group])
            begin += size

    def pack_checkpoint(self, blocks: Blocks) -> Bytes:
        """uint8 [1, checkpoint_bytes]; every sliding group with the blocks behind the boundary, oldest first."""
        return _joined([self.pack(group, blocks[group]).reshape(1, -1) for group in self._state])

    def unpack_checkpoint(self, data: Bytes, blocks: Blocks) -> None:
        """The inverse of `pack_checkpoint`."""
        begin = 0
        for group, count in self._state.items():
            size = count * self.block_bytes(group)
            self.unpack(group, data[0, begin : begin + size].reshape(count, -1), blocks[group])
            begin += size

    def pack(self, group: Group, ids: Sequence[int]) -> Bytes:
        """uint8 [len(ids), block_bytes(group)]."""
        out = torch.empty((len(ids), self.block_bytes(group)), dtype=torch.uint8, device=self._device)
        index = torch.tensor(ids, dtype=torch.int64, device=self._device)
        for begin, view in self._views(self._specs[group]):
            out[:, begin : begin + view.shape[1]] = view.index_select(0, index)
        return _in_host_memory(out).numpy()

    def unpack(self, group: Group, data: Bytes, ids: Sequence[int]) -> None:
        """The inverse of `pack`."""
        if not ids:  # a request that comes back may find all blocks of a group in the pool
            return
        source = torch.from_numpy(data).to(self._device)
        together = list(ids) == list(range(ids[0], ids[0] + len(ids)))
        index = torch.tensor(ids, dtype=torch.int64, device=self._device)
        for begin, view in self._views(self._specs[group]):
            part = source[:, begin : begin + view.shape[1]]
            wide = _widest(view, part)
            if together:  # as the blocks of a fresh pool are
                view[ids[0] : ids[0] + len(ids)].view(wide).copy_(part.view(wide))
            else:
                view.view(wide).index_copy_(0, index, part.view(wide))

    def _views(self, spec: CacheGroupSpec) -> list[tuple[int, Tensor]]:
        """For each stream and layer of a group: where its bytes begin in a block, and the pool as [blocks, bytes]."""
        views, begin = [], 0
        for stream in spec.streams:
            for layer in stream.layers:
                view = self._arena.block_bytes_view(stream.name, layer)
                views.append((begin, view))
                begin += view.shape[1]
        return views


def _in_host_memory(copied: Tensor) -> Tensor:
    """From a GPU into pinned memory, which the host tier then keeps: copies to and from it run at the bus's speed."""
    if copied.device.type == "cpu":
        return copied
    pinned = torch.empty(copied.shape, dtype=copied.dtype, pin_memory=True)
    return pinned.copy_(copied)


def _widest(*parts: Tensor) -> torch.dtype:
    """The widest elements that bytes [n, m] can be copied as: torch scatters single bytes fifteen times slower."""
    places = [place for part in parts for place in (part.shape[1], part.stride(0), part.storage_offset())]
    return next((wide for size, wide in _WIDE if all(place % size == 0 for place in places)), torch.uint8)


def _joined(parts: list[Bytes]) -> Bytes:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
