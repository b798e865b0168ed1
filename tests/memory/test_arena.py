"""The arena holds what was promised: every slot of every stream is there, in bytes that can be moved as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.fields import FLASH_LIKE, NARROW
from thalweg.cache.geometry import CacheGroupSpec, StreamSpec, cache_groups
from thalweg.cli.inspect import FORMATS, model_facts
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import load_model_config, parse_model_config
from thalweg.kernels.arguments import StoredRows
from thalweg.kernels.registry import reference_kernels
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import CachePlan, plan_cache
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.numerics import Numerics

CPU = torch.device("cpu")
ODD = {**NARROW, "head_dim": 44, "num_attention_heads": 4, "qk_rope_head_dim": 6, "index_head_dim": 32}
CONFIGS = {
    "flash-like": parse_model_config(FLASH_LIKE),
    "odd": parse_model_config(ODD),
    "default": load_model_config("default"),
}
every_format = pytest.mark.parametrize("form", list(FORMATS.values()), ids=list(FORMATS))
every_config = pytest.mark.parametrize("config", list(CONFIGS.values()), ids=list(CONFIGS))


def plan_of(config: ModelConfig, form: tuple[RowFormat, RowFormat], budget: int) -> CachePlan:
    layout = CacheLayout(*form, config.rope_dim)
    return plan_cache(cache_groups(config), layout, budget_bytes=budget, max_running=2)


def streams(plan: CachePlan) -> list[tuple[CacheGroupSpec, StreamSpec]]:
    return [(spec, stream) for spec in plan.groups for stream in spec.streams]


def stored(arena: CacheArena, stream: StreamSpec, layer: int, config: ModelConfig) -> StoredRows:
    numerics = Numerics.serving(torch.float32, arena.plan.layout.kv, arena.plan.layout.index)
    rows = numerics.index_rows if stream.kind == "index" else numerics.kv_rows
    return rows(arena.rows(stream.name, layer), config)


def read(arena: CacheArena, stream: StreamSpec, layer: int, config: ModelConfig, slots: torch.Tensor) -> torch.Tensor:
    if stream.kind == "state":
        return arena.rows(stream.name, layer)[slots]
    return reference_kernels().read_rows(stored(arena, stream, layer, config), slots)


@every_config
@every_format
def test_every_slot_is_written_and_read_back(config: ModelConfig, form: tuple[RowFormat, RowFormat]) -> None:
    """Each slot of each stream and layer gets a row of its own; the last ones are still there when all is full."""
    plan = plan_of(config, form, 12_000_000)
    arena = CacheArena(plan, CPU)
    last = {}
    for spec, stream in streams(plan):
        slots = torch.arange(plan.pool_blocks[spec.group] * stream.rows_per_block)
        for layer in stream.layers:
            rows = torch.randn(len(slots), stream.width, generator=torch.Generator().manual_seed(len(last)))
            if stream.kind == "state":
                arena.rows(stream.name, layer)[slots] = rows
            else:
                reference_kernels().store_rows(stored(arena, stream, layer, config), slots, rows)
            written = read(arena, stream, layer, config, slots)
            assert torch.allclose(
                written, rows, atol={"fp4": 1.0, "fp8": 0.25}.get(plan.layout.format_of(stream), 0.02)
            )
            last[stream.name, layer] = written[-50:]
    for _, stream in streams(plan):
        for layer in stream.layers:
            count = len(arena.rows(stream.name, layer))
            expected = last[stream.name, layer]
            slots = torch.arange(count - len(expected), count)
            assert torch.equal(read(arena, stream, layer, config, slots), expected)


@every_config
@every_format
def test_block_bytes_are_the_rows(config: ModelConfig, form: tuple[RowFormat, RowFormat]) -> None:
    """A block's bytes as tiers move them: the same memory, in the layout's size, block for block."""
    plan = plan_of(config, form, 12_000_000)
    arena = CacheArena(plan, CPU)
    total = 0
    for spec, stream in streams(plan):
        for layer in stream.layers:
            blocks, rows = arena.block_bytes_view(stream.name, layer), arena.rows(stream.name, layer)
            size = stream.rows_per_block * plan.layout.row_bytes(stream)
            assert blocks.dtype is torch.uint8 and blocks.shape == (plan.pool_blocks[spec.group], size)
            assert blocks.data_ptr() == rows.data_ptr() and blocks.is_contiguous()
            blocks[-1] = 1
            first = (len(blocks) - 1) * stream.rows_per_block
            assert (rows[first:].reshape(-1).view(torch.uint8) == 1).all() and not rows[:first].any()
            total += blocks.numel()
    assert total == plan.total_bytes


@every_format
def test_inspect_promises_what_the_pools_allocate(form: tuple[RowFormat, RowFormat]) -> None:
    config = load_model_config("default")
    plan = plan_of(config, form, 150_000_000)
    name = next(n for n, value in FORMATS.items() if value == form)
    facts = model_facts(config, 150_000_000)["formats"][name]
    promised = sum(facts["block_bytes"][group.value] * blocks for group, blocks in plan.pool_blocks.items())
    assert promised == CacheArena(plan, CPU).allocated_bytes == plan.total_bytes
    assert 0.99 * 150_000_000 < plan.total_bytes <= 150_000_000


FILLED = """
import psutil, torch
from tests.memory.test_arena import CPU, FORMATS, CacheArena, load_model_config, plan_of, streams

kept, process = [torch.zeros(9, 9, dtype=torch.uint8).fill_(1)], psutil.Process()  # code is loaded before counting
for form in FORMATS.values():
    plan = plan_of(load_model_config("default"), form, 150_000_000)
    start = process.memory_info().rss
    arena = CacheArena(plan, CPU)
    unused = process.memory_info().rss - start
    for _, stream in streams(plan):
        for layer in stream.layers:
            arena.block_bytes_view(stream.name, layer).fill_(1)
    print(plan.total_bytes, unused, process.memory_info().rss - start)
    kept.append(arena)
"""


def test_memory_is_taken_as_it_is_filled_and_no_more_than_promised() -> None:
    """In a process of its own: resident bytes after every byte of every pool was written, in every format."""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", FILLED], cwd=root, capture_output=True, text=True, check=True)
    lines = [[int(n) for n in line.split()] for line in result.stdout.splitlines()]
    assert len(lines) == len(FORMATS)
    for promised, unused, filled in lines:
        assert unused < 0.05 * promised
        assert filled == pytest.approx(promised, rel=0.01)
