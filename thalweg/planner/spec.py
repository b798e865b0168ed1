"""From a model and the memory of one replica to its layout: the same choices that a real engine makes at start-up."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.cache.geometry import cache_groups
from thalweg.cache.policy import policy_of
from thalweg.config.model import ModelConfig
from thalweg.engine.limits import EngineLimits
from thalweg.errors import ConfigError
from thalweg.memory.capacity import plan_cache
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.planner.replica import ReplicaSpec
from thalweg.planner.sim_tiers import TierSpec
from thalweg.planner.speculation import Acceptance


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """Of one replica; names and defaults are those of the engine's options. `pool_memory` is in bytes."""

    pool_memory: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    kv_cache_dtype: str = "fp8"
    index_cache_dtype: str = "fp8"
    window_policy: str = "boundary"
    checkpoint_interval: int = 4096
    enable_prefix_caching: bool = True
    max_waiting: int = 1024
    max_queue_seconds: float | None = None
    tiers: tuple[TierSpec, ...] = ()
    acceptance: Acceptance | None = None


def replica_spec(options: ReplicaOptions, config: ModelConfig) -> ReplicaSpec:
    """Raises ConfigError naming the option that does not fit."""
    if options.max_num_batched_tokens <= options.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: {options.max_num_batched_tokens} must be above max_num_seqs, "
            f"{options.max_num_seqs}",
            param="max_num_batched_tokens",
        )
    groups = cache_groups(config)
    policy = policy_of(config, options.window_policy, options.checkpoint_interval)
    layout = CacheLayout(RowFormat(options.kv_cache_dtype), RowFormat(options.index_cache_dtype), config.rope_dim)
    try:
        plan = plan_cache(
            groups,
            layout,
            budget_bytes=options.pool_memory,
            max_running=options.max_num_seqs,
            spacing_units=policy.spacing_units if options.enable_prefix_caching else 0,
        )
    except ConfigError as error:  # under the name that it has here
        raise ConfigError(error.message.replace("kv_cache_memory", "pool_memory"), param="pool_memory") from error
    longest = min(options.max_model_len or config.max_position_embeddings, plan.token_capacity)
    limits = EngineLimits(
        longest, plan.token_capacity, config.vocab_size, options.max_waiting, (), options.max_queue_seconds
    )
    return ReplicaSpec(
        groups, layout, plan.pool_blocks, policy, limits, options.max_num_seqs, options.max_num_batched_tokens,
        options.enable_prefix_caching, options.tiers, options.acceptance,
    )  # fmt: skip
