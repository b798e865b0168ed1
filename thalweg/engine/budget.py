"""How many bytes the cache pools may take, from what the memory has and what else must lie in it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.config.model import ModelConfig
from thalweg.config.options import EngineOptions
from thalweg.errors import ConfigError

_DEFAULT_CACHE_BYTES = 4 * 2**30
_DEFAULT_CACHE_SHARE = 0.25  # of the host's memory that is available at start-up
_GPU_RESERVE_BYTES = 2**30  # libraries, loaded kernels, captured graphs
_GPU_SLACK = 0.02  # of a GPU's memory, for what its allocator cannot use between two tensors
_COPIES = 3  # of a step's largest activations that live at once, in fp32


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Of the memory that weights and pools will share. `gpu`: nothing else is meant to live in it."""

    free_bytes: int
    total_bytes: int
    gpu: bool


def workspace_bytes(config: ModelConfig, step_tokens: int, max_sequences: int) -> int:
    """What a GPU's largest step may need for a while: queries, residual streams and experts' activations of its tokens,
    and sampling's copies of the logits."""
    widths = (
        config.num_attention_heads * config.head_dim,
        config.hc_streams * config.hidden_size,
        2 * (config.experts_per_token + 1) * config.moe_intermediate_size,
    )
    logits = max_sequences * config.vocab_size * 8
    return 4 * _COPIES * step_tokens * sum(widths) + 4 * logits


def cache_budget(options: EngineOptions, memory: MemoryFacts, weights: int, workspace: int) -> tuple[int, str]:
    """Of all pools together, and why. Raises ConfigError where the weights alone are more than the share allowed, or
    leave a GPU nothing."""
    if options.kv_cache_memory is not None:
        return options.kv_cache_memory, "as set"
    share = options.memory_utilization
    if share is not None:
        budget = int(share * memory.total_bytes) - weights
        if budget <= 0:
            raise ConfigError(
                f"memory_utilization: the weights take {weights:,} bytes, more than {share:g} of "
                f"{memory.total_bytes:,}",
                param="memory_utilization",
            )
        return budget, f"{share:g} of the memory, without {weights:,} bytes of weights"
    if not memory.gpu:
        budget = int(min(_DEFAULT_CACHE_BYTES, _DEFAULT_CACHE_SHARE * memory.free_bytes))
        return budget, "the lesser of 4 GiB and a quarter of the free memory"
    kept = workspace + _GPU_RESERVE_BYTES + int(_GPU_SLACK * memory.total_bytes)
    budget = memory.free_bytes - weights - kept
    if budget <= 0:
        raise ConfigError(
            f"kv_cache_memory: {memory.free_bytes:,} free bytes of the GPU leave nothing for the cache beside "
            f"{weights:,} bytes of weights and {kept:,} for computing; a lower max_num_batched_tokens needs less",
            param="kv_cache_memory",
        )
    return budget, f"the GPU's free memory, without {weights:,} bytes of weights and {kept:,} for computing"
