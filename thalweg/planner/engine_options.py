"""Options of `serve` as the planner simulates them: an endpoint profile, a configuration file, or a candidate."""

from __future__ import annotations

from thalweg.config.model import ModelConfig
from thalweg.config.options import EngineOptions
from thalweg.planner.replica import ReplicaSpec
from thalweg.planner.scenario import HOST_RATE, tiers_of
from thalweg.planner.spec import ReplicaOptions, replica_spec
from thalweg.planner.speculation import Acceptance

USUAL_POOL_BYTES = 4 * 2**30  # what `serve` takes on a machine with enough memory and no --kv-cache-memory


def spec_of(
    options: EngineOptions,
    config: ModelConfig,
    *,
    pool_memory: int = USUAL_POOL_BYTES,
    formats: tuple[str, str] = ("fp8", "fp8"),
    link: float = HOST_RATE,
    acceptance: Acceptance | None = None,
) -> ReplicaSpec:
    """One replica that `serve` would make of these options. `formats` are those of rows and of index keys where the
    options leave them to `auto`; `link` is bytes per second to the host. Raises ConfigError."""
    pool = options.kv_cache_memory or pool_memory
    host = options.kv_host_memory
    host = int(options.kv_host_ratio * pool) if host is None else host
    disk = 0 if options.kv_disk_dir is None else options.kv_disk_space
    own = (options.kv_cache_dtype, options.index_cache_dtype)
    kv, index = (given if chosen == "auto" else chosen for chosen, given in zip(own, formats, strict=True))
    replica = ReplicaOptions(
        pool_memory=pool,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        kv_cache_dtype=kv,
        index_cache_dtype=index,
        window_policy=options.window_policy,
        checkpoint_interval=options.checkpoint_interval,
        enable_prefix_caching=options.enable_prefix_caching,
        max_waiting=options.max_waiting,
        max_queue_seconds=options.max_queue_seconds,
        tiers=tiers_of(host, disk, link) if options.enable_prefix_caching else (),
        acceptance=acceptance,
    )
    return replica_spec(replica, config)
