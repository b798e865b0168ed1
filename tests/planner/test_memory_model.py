"""What fits: page geometry beside what vLLM itself reports, ours beside the pools', and proofs that add up."""

from __future__ import annotations

import pytest

from thalweg.cache.geometry import cache_groups
from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.memory.capacity import plan_cache, request_bytes, sequences_that_fit, unit_bytes
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.planner.layout import Deployment, ParallelLayout, Speculation
from thalweg.planner.memory_model import GIB, plan_memory, session_need, weight_bytes

FLASH, PRO = load_model_config("flash"), load_model_config("pro")
MILLION = 2**20
LAYOUT = CacheLayout(RowFormat.FP8, RowFormat.FP8, FLASH.rope_dim)


def test_vllms_pages_are_those_that_it_reports() -> None:
    """vllm-project/vllm#54703: pages of 1,002,240 bytes; blocks of 256, 64, 64, 4 and 8 tokens, for Flash."""
    need = session_need(FLASH, "vllm", 8192)
    assert [(g.block_bytes, g.block_tokens) for g in need.groups] == [
        (1002240, 256), (1002240, 64), (1002240, 64), (1002240, 4), (1002240, 8),
    ]  # fmt: skip
    assert need.request_bytes == 1002240 * (131 + 131 + 2051 + 1041)
    assert need.token_bytes == 3915
    assert need.bytes(MILLION) / GIB == pytest.approx(6.95, abs=0.01)


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [(ParallelLayout(8, expert_parallel=True), 21_419_891), (ParallelLayout(1, 8, expert_parallel=True), 20_571_235)],
)
def test_capacity_is_what_vllm_logged(layout: ParallelLayout, tokens: int) -> None:
    plan = plan_memory(FLASH, Deployment("vllm", "B200", layout), utilization=0.95)
    assert plan.tokens(MILLION) == pytest.approx(tokens, rel=0.03)


def test_our_need_is_the_pools() -> None:
    groups, need = cache_groups(FLASH), session_need(FLASH, "thalweg", 1024, LAYOUT)
    assert need.token_bytes == pytest.approx(
        unit_bytes(groups, LAYOUT) / 128 + next(g.block_bytes for g in need.groups if g.name == "checkpoints") / 128
    )
    assert need.request_bytes == request_bytes(groups, LAYOUT)
    for budget in (40 * GIB, 140 * GIB):
        for tokens in (65536, MILLION):
            fits = sequences_that_fit(groups, LAYOUT, budget_bytes=budget, tokens=tokens)
            assert budget // need.bytes(tokens) == pytest.approx(fits, abs=1)
    bare = session_need(FLASH, "thalweg", 1024, LAYOUT, prefix_caching=False)
    plan = plan_cache(groups, LAYOUT, budget_bytes=40 * GIB, max_running=8, spacing_units=0)
    assert 40 * GIB // bare.bytes(MILLION) == plan.token_capacity // MILLION


@pytest.mark.parametrize("model", [FLASH, PRO])
def test_weights_are_divided_by_the_layout(model) -> None:
    one = weight_bytes(model, ParallelLayout(), "mxfp4")
    sliced = weight_bytes(model, ParallelLayout(8), "mxfp4")
    spread = weight_bytes(model, ParallelLayout(1, 8, expert_parallel=True), "mxfp4")
    assert one / 8 < sliced < spread < 0.25 * one
    assert weight_bytes(model, ParallelLayout(), "fp8") > 1.7 * one
    assert weight_bytes(model, ParallelLayout(), "mxfp4", drafts=True) > one


def test_a_proof_adds_up_to_the_memory() -> None:
    plan = plan_memory(PRO, Deployment("vllm", "B300", ParallelLayout(8), speculation=Speculation(1, 1.8)))
    assert sum(plan.proof(MILLION).values()) == plan.usable_bytes
    assert all(size >= 0 for size in plan.proof(MILLION).values())
    whole = int(plan.sessions(MILLION))
    assert whole * plan.need.bytes(MILLION) <= plan.pool_bytes < (whole + 1) * plan.need.bytes(MILLION)


def test_what_does_not_fit_or_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"61 layers on 4 x H100 need .* GiB per GPU"):
        plan_memory(PRO, Deployment("vllm", "H100", ParallelLayout(4)))
    with pytest.raises(ConfigError, match=r"page geometry of 'sglang' is not known; known: thalweg, vllm"):
        plan_memory(FLASH, Deployment("sglang", "B200", ParallelLayout(8)))
    with pytest.raises(ConfigError, match=r"utilization: 1\.5"):
        plan_memory(FLASH, Deployment("vllm", "B200", ParallelLayout(8)), utilization=1.5)
