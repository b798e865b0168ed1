"""The arena holds what was promised: every slot of every stream is there, in bytes that can be moved as they are."""

from __future__ import annotations

from pathlib import Path

import psutil
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


@every_config
@every_format
def test_every_slot_is_written_and_read_back(config: ModelConfig, form: tuple[RowFormat, RowFormat]) -> None:
    """Each slot of a stream gets its own row; the last ones are still right when everything is full."""
    plan, kernels = plan_of(config, form, 12_000_000), reference_kernels()
    arena = CacheArena(plan, CPU)
    expected = {}
    for spec, stream in streams(plan):
        slots = plan.pool_blocks[spec.group] * stream.rows_per_block
        assert slots > 0
        for layer in stream.layers:
            generator = torch.Generator().manual_seed(layer * 97 + len(stream.name))
            rows = torch.randn(slots, stream.width, generator=generator)
            if stream.kind == "state":
                arena.rows(stream.name, layer)[:] = rows
            else:
                target = stored(arena, stream, layer, config)
                kernels.store_rows(target, torch.arange(slots), rows)
                rows = {RowFormat.FLOAT32: rows, RowFormat.BFLOAT16: rows.bfloat16().float()}.get(
                    plan.layout.format_of(stream), kernels.read_rows(target, torch.arange(slots))
                )
                assert (rows - torch.randn(rows.shape, generator=generator.manual_seed(generator.initial_seed()))).abs(
                ).max() < 1.0
            expected[stream.name, layer] = rows[-50:]
    for (_, stream), layer in ((pair, layer) for pair in streams(plan) for layer in pair[1].layers):
        data = arena.rows(stream.name, layer)
        last = torch.arange(len(data) - len(expected[stream.name, layer]), len(data))
        if stream.kind == "state":
            read = data[last]
        else:
            read = kernels.read_rows(stored(arena, stream, layer, config), last)
        assert torch.equal(read, expected[stream.name, layer])


@every_config
@every_format
def test_block_bytes_are_the_rows(config: ModelConfig, form: tuple[RowFormat, RowFormat]) -> None:
    """A block's bytes as tiers move them: the same memory, in the layout's size, block for block."""
    plan = plan_of(config, form, 12_000_000)
    arena = CacheArena(plan, CPU)
    moved = 0
    for spec, stream in streams(plan):
        for layer in stream.layers:
            blocks, rows = arena.block_bytes_view(stream.name, layer), arena.rows(stream.name, layer)
            size = stream.rows_per_block * plan.layout.row_bytes(stream)
            assert blocks.dtype is torch.uint8 and blocks.shape == (plan.pool_blocks[spec.group], size)
            assert blocks.data_ptr() == rows.data_ptr() and blocks.is_contiguous()
            blocks[-1] = 1
            first = (len(blocks) - 1) * stream.rows_per_block
            assert (rows[first:].reshape(-1).view(torch.uint8) == 1).all() and not rows[:first].any()
            moved += blocks.numel()
    assert moved == plan.total_bytes


@every_format
def test_inspect_promises_what_the_pools_take(form: tuple[RowFormat, RowFormat]) -> None:
    """Bytes by `inspect` times blocks = bytes allocated = memory that the process takes when all is written."""
    config = load_model_config("default")
    plan = plan_of(config, form, 150_000_000)
    name = next(n for n, value in FORMATS.items() if value == form)
    facts = model_facts(config, 150_000_000)["formats"][name]
    promised = sum(facts["block_bytes"][group.value] * blocks for group, blocks in plan.pool_blocks.items())
    arena = CacheArena(plan, CPU)
    assert promised == arena.allocated_bytes == plan.total_bytes
    assert 0.99 * 150_000_000 < plan.total_bytes <= 150_000_000
    before = psutil.Process().memory_info().rss
    for _, stream in streams(plan):
        for layer in stream.layers:
            arena.block_bytes_view(stream.name, layer).fill_(1)
    assert psutil.Process().memory_info().rss - before == pytest.approx(promised, rel=0.01)


def test_an_unused_pool_takes_no_memory() -> None:
    plan = plan_of(load_model_config("default"), (RowFormat.FP8, RowFormat.FP4), 2**30)
    before = psutil.Process().memory_info().rss
    arena = CacheArena(plan, CPU)
    assert arena.allocated_bytes > 0.99 * 2**30
    assert psutil.Process().memory_info().rss - before < 2**25


def test_the_module_of_the_layout_reads_no_torch() -> None:
    import thalweg.memory.layout

    assert "torch" not in Path(thalweg.memory.layout.__file__).read_text().replace("No torch here", "")
