"""Capacity is true: byte layouts, the division of a budget, and what the arena really allocates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.shapes import configs
from thalweg.cache.geometry import cache_groups
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import plan_cache, request_bytes, unit_bytes
from thalweg.memory.layout import CacheLayout, RowFormat

FORMATS = [
    (RowFormat.FP8, RowFormat.FP4),
    (RowFormat.FP8, RowFormat.FP8),
    (RowFormat.BFLOAT16,) * 2,
    (RowFormat.FLOAT32,) * 2,
]


def test_served_rows() -> None:
    groups = {s.group.value: s for s in cache_groups(load_model_config("flash"))}
    rows = {}
    for kv, index in FORMATS:
        layout = CacheLayout(kv, index, 64)
        rows[index] = (layout.row_bytes(groups["csa"].streams[0]), layout.row_bytes(groups["index"].streams[0]))
        padding = {s.kind: layout.padding_bytes(s) for spec in groups.values() for s in spec.streams}
        assert padding == {"kv": int(kv is RowFormat.FP8), "index": 0, "state": 0}
    assert rows == {
        RowFormat.FP4: (584, 68),
        RowFormat.FP8: (584, 132),
        RowFormat.BFLOAT16: (1024, 256),
        RowFormat.FLOAT32: (2048, 512),
    }
    with pytest.raises(ConfigError, match="fp4"):
        CacheLayout(RowFormat.FP4, RowFormat.FP4, 64)


@settings(max_examples=50, deadline=None)
@given(configs(), st.sampled_from(FORMATS), st.integers(1, 8), st.integers(1, 6))
def test_the_arena_allocates_what_the_plan_says(
    config: ModelConfig, form: tuple[RowFormat, RowFormat], running: int, megabytes: int
) -> None:
    groups, layout = cache_groups(config), CacheLayout(*form, config.rope_dim)
    budget = megabytes * 4_000_000
    try:
        plan = plan_cache(groups, layout, budget_bytes=budget, max_running=running)
    except ConfigError as error:
        assert error.param == "kv_cache_memory" and f"{budget:,}" in error.message
        return
    arena = CacheArena(plan, torch.device("cpu"))
    assert arena.allocated_bytes == plan.total_bytes <= budget
    unit = unit_bytes(groups, layout)
    if unit:
        assert plan.total_bytes > budget - 2 * unit - request_bytes(groups, layout)
        assert plan.token_capacity >= running * config.unit_tokens


def test_large_budgets_are_used_whole_and_length_does_not_matter() -> None:
    config = load_model_config("flash")
    groups, layout = cache_groups(config), CacheLayout(RowFormat.FP8, RowFormat.FP4, config.rope_dim)
    plan = plan_cache(groups, layout, budget_bytes=64 * 2**30, max_running=32)
    assert 0.99 * 64 * 2**30 < plan.total_bytes <= 64 * 2**30
    assert plan.sequences_of(1 << 20) == plan.token_capacity // (1 << 20)
    assert plan.sequences_of(128) == 32
    without = plan_cache(groups, layout, budget_bytes=64 * 2**30, max_running=32, spacing_units=0)
    assert without.token_capacity > plan.token_capacity
