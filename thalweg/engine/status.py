"""What an engine says of itself: a snapshot between two steps, which any thread may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from thalweg.cache.pool import GroupUsage
from thalweg.engine.scheduler import Scheduler
from thalweg.memory.tier import TierUsage
from thalweg.metrics.prometheus import TierGauges
from thalweg.types import Timeline


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot, taken when the engine's clock showed `seconds`.

    `failure` says why nothing is served now: for good, or until the engine has restarted. `waiting` has those that wait
    for room, `loading` those whose rows are on their way. `timelines` has the running and loading requests by id.
    """

    seconds: float
    running: int
    waiting: int
    groups: tuple[GroupUsage, ...]
    counters: Mapping[str, float]
    healthy: bool
    failure: str | None
    loading: int = 0
    timelines: Mapping[str, Timeline] = field(default_factory=dict)


def status_of(scheduler: Scheduler, counters: Mapping[str, float], seconds: float, *, healthy: bool) -> EngineStatus:
    """The status of an engine that has not failed. `counters` are its own; those of its parts come on top."""
    coordinator = scheduler.coordinator
    everything = {
        **counters,
        **scheduler.tiering.counters,
        "preemptions": scheduler.preemptions,
        "evicted_units": coordinator.evicted_units,
        "evicted_checkpoints": coordinator.evicted_checkpoints,
        "cached_units": coordinator.index.nodes,
        **{f"evicted_for_{group.value}": count for group, count in coordinator.evicted.items()},
        **{f"checkpoints_{reason.name.lower()}": n for reason, n in coordinator.checkpoints_made.items()},
    }
    loading = [loading.sequence for loading in scheduler.loading]
    running = [running.sequence for running in scheduler.running]
    return EngineStatus(
        seconds,
        len(running),
        len(scheduler.waiting),
        coordinator.usage(),
        everything,
        healthy,
        None,
        len(loading),
        {sequence.request_id: sequence.timeline for sequence in (*loading, *running)},
    )


def tier_gauges(name: str, usage: TierUsage) -> TierGauges:
    """A tier's usage as /metrics and the live page show it."""
    counts = asdict(usage)
    held = {kind: counts.pop(f"{kind}_bytes") for kind in ("rows", "checkpoint")}
    held["other"] = counts.pop("bytes") - sum(held.values())
    records = counts.pop("rows_records") + counts.pop("checkpoint_records")
    return TierGauges(name, counts.pop("capacity_bytes"), records, held, counts)
