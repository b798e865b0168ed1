"""Random cache geometries: models of any mix of layers, without weights."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.model.fields import FLASH_LIKE
from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import CacheGroupSpec, Group, cache_groups
from thalweg.cache.policy import CheckpointPolicy
from thalweg.config.model import LayerKind, ModelConfig
from thalweg.config.model_parse import parse_model_config
from thalweg.memory.capacity import live_blocks

MODEL = parse_model_config(FLASH_LIKE)


def configs() -> st.SearchStrategy[ModelConfig]:
    """Layer kinds in any order, windows below, at and above a unit."""
    kinds = st.lists(st.sampled_from(list(LayerKind)), min_size=1, max_size=4).map(tuple)
    return st.builds(
        lambda layers, window: replace(MODEL, layer_kinds=layers, window=window), kinds, st.sampled_from([16, 128, 200])
    )


def coordinator_of(
    config: ModelConfig, units: int, checkpoints: int, *, interval: int = 256, running: int = 3, caching: bool = True
) -> Coordinator:
    """A coordinator with so many compressed units, and sliding blocks for `running` requests and the checkpoints."""
    groups = cache_groups(config)
    sizes = {spec.group: _blocks(spec, units, checkpoints, running) for spec in groups}
    return Coordinator(groups, sizes, CheckpointPolicy(config.unit_tokens, interval), prefix_caching=caching)


def _blocks(spec: CacheGroupSpec, units: int, checkpoints: int, running: int) -> int:
    if spec.blocks_behind is None:
        return units
    return running * live_blocks(spec) + checkpoints * spec.blocks_behind


def free_blocks(coordinator: Coordinator) -> dict[Group, int]:
    return {group: pool.free_blocks for group, pool in coordinator.pools.items()}
