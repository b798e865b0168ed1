"""Configurations worth a simulation: those that fit, put in order by closed forms, and why the others do not fit.

The closed form of a load: a rank's busy share = its requests per second x (seconds of a prompt's new tokens + output
tokens x seconds of a decode in a full batch). Over 1 no queue ever ends. It takes the hits of an endless cache; it only
decides what is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thalweg.errors import ConfigError
from thalweg.planner.cost import Estimate, StepCost, StepWork
from thalweg.planner.demand import Demand
from thalweg.planner.layout import ParallelLayout, Speculation
from thalweg.planner.platform import Accelerators, Platform, Room, gib
from thalweg.planner.replica import ReplicaSpec
from thalweg.planner.scenario import tiers_of
from thalweg.planner.serving import Serving, SplitServing
from thalweg.planner.spec import ReplicaOptions, replica_spec
from thalweg.planner.speculation import Acceptance

MOST_BUSY = 0.7  # of a rank, by closed form: beyond, queues grow
RUNNING = 64  # requests of a rank at once, where its pools hold so many


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration. `engines` of `layout` share the load; memory is that of a rank, in bytes."""

    layout: ParallelLayout
    engines: int = 1
    chunk_tokens: int = 8192
    max_num_seqs: int = RUNNING
    window_policy: str = "boundary"
    checkpoint_interval: int = 4096
    host_memory: int = 0
    disk_space: int = 0
    speculation: Speculation | None = None

    @property
    def gpus(self) -> int:
        return self.engines * self.layout.gpus

    @property
    def ranks(self) -> int:
        return self.engines * self.layout.dp

    @property
    def tiers(self) -> str:
        """The tiers by name."""
        lower = (("host", self.host_memory), ("disk", self.disk_space))
        return "+".join(["device", *(name for name, size in lower if size)])

    def __str__(self) -> str:
        many = f"{self.engines} x " if self.engines > 1 else ""
        drafts = f", {self.speculation.drafts} drafts" if self.speculation else ""
        return f"{many}{self.layout}, chunk {self.chunk_tokens:,}, {self.policy}, {self.tiers}{drafts}"

    @property
    def policy(self) -> str:
        """The window policy, with the interval of checkpoints where it has one."""
        return f"boundary/{self.checkpoint_interval}" if self.window_policy == "boundary" else self.window_policy


@dataclass(frozen=True, slots=True)
class Refusal:
    """A configuration that cannot serve the load. `budget` names what fails: memory, pool, heads or time."""

    what: str
    budget: str
    missing: str


@dataclass(frozen=True, slots=True)
class Sketch:
    """A candidate by closed forms. `busy` is the share of time that a rank computes; over 1 the load is not carried."""

    candidate: Candidate
    ttft: float
    tpot: float
    busy: float


def rank_spec(
    platform: Platform, candidate: Candidate, seed: int = 0, pool_share: float = 1.0
) -> tuple[ReplicaSpec, Room]:
    """One rank's pools, or a share of them, limits and tiers. Raises ConfigError naming the budget that fails."""
    room = platform.room(candidate.layout, candidate.chunk_tokens, candidate.speculation)
    kv, index = platform.formats
    options = ReplicaOptions(
        pool_memory=int(room.pool * pool_share),
        max_num_seqs=candidate.max_num_seqs,
        max_num_batched_tokens=candidate.chunk_tokens,
        kv_cache_dtype=kv,
        index_cache_dtype=index,
        window_policy=candidate.window_policy,
        checkpoint_interval=candidate.checkpoint_interval,
        max_waiting=1 << 20,
        tiers=tiers_of(candidate.host_memory, candidate.disk_space, platform.link),
        acceptance=Acceptance(candidate.speculation, seed) if candidate.speculation else None,
    )
    return replica_spec(options, platform.model), room


def proof(spec: ReplicaSpec, room: Room) -> dict[str, int]:
    """Bytes of one rank by name, which add up to the usable memory: weights, workspace, groups' pools, left over."""
    pools = {s.group.value: spec.layout.block_bytes(s) * spec.pool_blocks[s.group] for s in spec.groups}
    left = room.usable - room.weights - room.workspace - sum(pools.values())
    return {"weights": room.weights, "workspace": room.workspace, **pools, "left over": left}


def sketches(platform: Platform, demand: Demand, first: Candidate) -> tuple[list[Sketch], list[Refusal]]:
    """Every layout with as few engines as carry the load, and with all; and what does not fit. `first` holds what is
    the same in all of them."""
    found: list[Sketch] = []
    refused: list[Refusal] = []
    for layout in platform.layouts():
        alone = replace(first, layout=layout, engines=1)
        refusal = unfit(platform, alone, demand)
        if refusal is not None:
            refused.append(refusal)
            continue
        cost = platform.cost(layout, alone.chunk_tokens, alone.speculation)
        most = platform.gpus // layout.gpus
        counts = [n for n in _doublings(most) if sketch(cost, replace(alone, engines=n), demand).busy <= MOST_BUSY]
        if not counts:
            best = sketch(cost, replace(alone, engines=most), demand)
            if best.busy > 1:
                over = f"{best.busy - 1:.0%} more work than time: {most * layout.gpus} GPUs, busy {best.busy:.0%}"
                refused.append(Refusal(str(best.candidate), "time", over))
        for engines in dict.fromkeys([*counts[:1], most]):
            one = sketch(cost, replace(alone, engines=engines), demand)
            if one.busy <= 1:
                found.append(one)
    return found, refused


def _doublings(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts


def unfit(platform: Platform, candidate: Candidate, demand: Demand) -> Refusal | None:
    """Why a rank cannot hold the model, or the longest request; None if it can."""
    try:
        spec, room = rank_spec(platform, candidate)
    except ConfigError as error:
        budget = {"tp": "heads", "dp": "experts"}.get(error.param or "", "memory")
        return Refusal(str(candidate), budget, error.message)
    longest = spec.limits.max_model_len
    if demand.longest_tokens <= longest:
        return None
    missing = f"the longest request has {demand.longest_tokens:,} tokens, {demand.longest_tokens - longest:,} more than"
    if spec.limits.token_capacity > longest:
        return Refusal(str(candidate), "positions", f"{missing} the model's {longest:,} positions")
    return Refusal(str(candidate), "pool", f"{missing} a rank's pools of {gib(room.pool)} hold ({longest:,})")


def sketch(cost: StepCost, candidate: Candidate, demand: Demand) -> Sketch:
    """The closed form of the module's first lines."""
    past = int(demand.prompt_tokens - demand.new_tokens)
    prompt, new = 0.0, int(demand.new_tokens)
    while new > 0:
        chunk = min(new, candidate.chunk_tokens)
        prompt += cost.seconds(StepWork(((chunk, past),), sampled=int(chunk == new)))
        past, new = past + chunk, new - chunk
    yields = candidate.speculation.accepted if candidate.speculation else 1.0
    each = 1 + candidate.speculation.drafts if candidate.speculation else 1
    rate = demand.rate / candidate.ranks
    context = int(demand.prompt_tokens + demand.output_tokens / 2)
    full = cost.seconds(StepWork.decode(candidate.max_num_seqs, context, each)) / candidate.max_num_seqs
    busy = rate * (prompt + demand.output_tokens * full / yields)
    pace, batch = 0.0, 1
    for _ in range(6):
        step = cost.seconds(StepWork.decode(batch, context, each))
        pace = step / yields / max(0.05, 1 - rate * prompt)  # prompts take their share of the time
        batch = max(1, min(candidate.max_num_seqs, round(rate * demand.output_tokens * pace)))
    return Sketch(candidate, prompt, pace, busy)


@dataclass(frozen=True, slots=True)
class Split:
    """Prompts on some engines and decodes on others, by closed forms alone."""

    what: str
    ttft: Estimate
    tpot: Estimate


def split_sketch(platform: Platform, demand: Demand, chunk_tokens: int) -> Split | None:
    """Half of the GPUs or fewer for prompts, as the load's work divides, in the smallest layout that holds the model;
    None where there are not two such engines."""
    if not isinstance(platform, Accelerators):
        return None
    layout = next((one for one in platform.layouts() if unfit(platform, Candidate(one), demand) is None), None)
    if layout is None or 2 * layout.gpus > platform.gpus:
        return None
    engine = Serving(platform.cost(layout, chunk_tokens, None))
    apart = SplitServing(engine, engine)
    prompt, output = int(demand.prompt_tokens), max(1, int(demand.output_tokens))
    computed = engine.warm_ttft(prompt, prompt - int(demand.new_tokens))
    moved = apart.transfer_seconds(prompt)
    engines = platform.gpus // layout.gpus
    tpot = apart.tpot(4 * layout.dp, prompt, output)
    share = computed.seconds / (computed.seconds + output * tpot.seconds / 4)
    prefills = min(engines - 1, max(1, round(share * engines)))
    ttft = Estimate(computed.seconds + moved, computed.low + moved, computed.high + moved, computed.origin)
    return Split(f"{prefills} x {layout} and {engines - prefills} x {layout}", ttft, tpot)
