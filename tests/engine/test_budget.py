"""How large the pools are, from what a memory is said to have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.model.fields import FLASH_LIKE
from thalweg.config.model_parse import parse_model_config
from thalweg.config.options import EngineOptions
from thalweg.engine.budget import MemoryFacts, cache_budget, workspace_bytes
from thalweg.errors import ConfigError

GIB = 2**30
GPU = MemoryFacts(79 * GIB, 80 * GIB, gpu=True)
HOST = MemoryFacts(20 * GIB, 32 * GIB, gpu=False)


def test_a_gpu_gives_what_computing_leaves() -> None:
    budget, why = cache_budget(EngineOptions(), GPU, 40 * GIB, 3 * GIB)
    assert budget == 79 * GIB - 40 * GIB - 3 * GIB - GIB - int(0.02 * 80 * GIB)
    assert f"{40 * GIB:,}" in why
    other = replace(GPU, free_bytes=50 * GIB)  # somebody else's memory is not ours
    assert cache_budget(EngineOptions(), other, 40 * GIB, 3 * GIB)[0] == budget - 29 * GIB


def test_a_gpu_without_room_says_so() -> None:
    with pytest.raises(ConfigError, match="leave nothing for the cache") as raised:
        cache_budget(EngineOptions(), GPU, 77 * GIB, GIB)
    assert raised.value.param == "kv_cache_memory"


def test_the_host_keeps_most_of_its_memory() -> None:
    assert cache_budget(EngineOptions(), HOST, 10 * GIB, GIB)[0] == 4 * GIB
    assert cache_budget(EngineOptions(), replace(HOST, free_bytes=8 * GIB), 10 * GIB, GIB)[0] == 2 * GIB


@pytest.mark.parametrize("memory", [GPU, HOST])
def test_what_is_set_holds_on_every_device(memory: MemoryFacts) -> None:
    assert cache_budget(EngineOptions(kv_cache_memory=5), memory, 40 * GIB, GIB) == (5, "as set")
    share = EngineOptions(memory_utilization=0.9)
    assert cache_budget(share, memory, 10 * GIB, GIB)[0] == int(0.9 * memory.total_bytes) - 10 * GIB
    with pytest.raises(ConfigError, match="memory_utilization"):
        cache_budget(share, memory, 79 * GIB, GIB)


def test_a_workspace_grows_with_the_step_and_not_with_the_context() -> None:
    config = parse_model_config(FLASH_LIKE)
    one, more = workspace_bytes(config, 1024, 16), workspace_bytes(config, 2048, 16)
    per_token = 4 * 3 * (4 * 32 + 4 * 48 + 2 * 3 * 32)
    assert more - one == 1024 * per_token
    assert workspace_bytes(config, 1024, 17) - one == 32 * config.vocab_size
    longer = replace(config, max_position_embeddings=2 * config.max_position_embeddings)
    assert workspace_bytes(longer, 1024, 16) == one
