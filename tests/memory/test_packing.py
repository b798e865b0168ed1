"""Blocks as plain bytes: what is taken out of some blocks and put into others is the same there, in every format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.model.fields import GEOMETRIES
from thalweg.cache.geometry import cache_groups
from thalweg.config.model_parse import parse_model_config
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import checkpoint_bytes, plan_cache, unit_bytes
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.memory.packing import BlockPacker

FORMATS = [(RowFormat.FLOAT32, RowFormat.FLOAT32), (RowFormat.BFLOAT16, RowFormat.FP8), (RowFormat.FP8, RowFormat.FP4)]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(("geometry", "odd"), [("flash-like", 0), ("narrow", 0), ("narrow", 1)])
def test_bytes_go_out_and_in_again(geometry: str, odd: int, formats: tuple[RowFormat, RowFormat]) -> None:
    config = parse_model_config(GEOMETRIES[geometry])
    config = replace(config, head_dim=config.head_dim + odd)  # rows whose bytes no wide element divides
    layout = CacheLayout(*formats, config.rope_dim)
    plan = plan_cache(cache_groups(config), layout, budget_bytes=20_000_000, max_running=2)
    arena = CacheArena(plan, torch.device("cpu"))
    packer = BlockPacker(arena)
    assert packer.unit_bytes == unit_bytes(plan.groups, layout)
    assert packer.checkpoint_bytes == checkpoint_bytes(plan.groups, layout)
    generator = torch.Generator().manual_seed(0)
    for spec in plan.groups:
        for stream in spec.streams:
            for layer in stream.layers:
                view = arena.block_bytes_view(stream.name, layer)
                view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=generator))
    here, there = [5, 0, 3], [1, 7, 6]
    compressed = [s.group for s in plan.groups if s.compressed]
    units = packer.pack_units(dict.fromkeys(compressed, here))
    packer.unpack_units(units, dict.fromkeys(compressed, there))
    assert units.shape == (3, packer.unit_bytes)
    assert (packer.pack_units(dict.fromkeys(compressed, there)) == units).all()
    for group in compressed:  # a request that comes back may find all its blocks in the pool
        packer.unpack(group, packer.pack(group, here)[[]], [])
    state = {s.group: list(range(s.blocks_behind or 0)) for s in plan.groups if not s.compressed}
    checkpoint = packer.pack_checkpoint(state)
    moved = {group: [number + 2 for number in numbers] for group, numbers in state.items()}
    packer.unpack_checkpoint(checkpoint, moved)
    assert (packer.pack_checkpoint(moved) == checkpoint).all()
    for spec in plan.groups:
        for stream in spec.streams:
            for layer in stream.layers if spec.compressed else ():
                view = arena.block_bytes_view(stream.name, layer)
                assert torch.equal(view[here], view[there])
