"""The simulator: many steps at once are the same as one by one, the same seed gives the same result, blocks are
conserved, tiers take the time of their bandwidth, and it is fast."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from tests.model.fields import FLASH_LIKE, NARROW, PRO_LIKE
from tests.planner.traces import COST, random_sessions
from thalweg.config.model_parse import load_model_config, parse_model_config
from thalweg.memory.capacity import live_blocks, unit_bytes
from thalweg.planner.cost import StepWork
from thalweg.planner.layout import Speculation
from thalweg.planner.outcome import SimulationResult
from thalweg.planner.replica import ReplicaSpec
from thalweg.planner.routing import Routing
from thalweg.planner.sim_tiers import TierSpec
from thalweg.planner.simulator import Simulation
from thalweg.planner.spec import ReplicaOptions, replica_spec
from thalweg.planner.speculation import Acceptance
from thalweg.planner.trace import Session, Turn
from thalweg.planner.workload import workload_sessions

TIERS = (TierSpec("host", 3_000_000, 1e8, 5e7), TierSpec("disk", 6_000_000, 2e7, 1e7, 0.001))
LEAST_REQUESTS_PER_SECOND = 150  # of the processor's time; a quiet core does some ten times as many


def spec_of(fields: dict, units: int, **options) -> ReplicaSpec:
    """A replica of a small model whose compressed pools hold so many units."""
    config = parse_model_config(fields)
    given = {"pool_memory": 60_000_000, "max_num_seqs": 5, "max_num_batched_tokens": 96, "checkpoint_interval": 256}
    spec = replica_spec(ReplicaOptions(**{**given, **options}), config)
    small = {s.group: units if s.compressed else 5 * live_blocks(s) + 8 * (s.blocks_behind or 0) for s in spec.groups}
    return replace(spec, pool_blocks=small, limits=replace(spec.limits, token_capacity=units * 128))


def simulated(spec: ReplicaSpec, sessions: list[Session], **rest) -> tuple[SimulationResult, Simulation]:
    simulation = Simulation(spec, COST, **rest)
    result = simulation.run(sessions)
    for replica in simulation.replicas:
        replica.coordinator.check()
        assert not replica.scheduler.running and not replica.scheduler.waiting
    return result, simulation


def plain(result: SimulationResult) -> tuple:
    return sorted(map(repr, result.requests.rows())), result.summary()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fields", [FLASH_LIKE, PRO_LIKE, NARROW], ids=["flash", "pro", "narrow"])
def test_many_steps_at_once_are_the_same_as_one_by_one(fields: dict, seed: int) -> None:
    """Small pools, so that blocks are evicted and requests give way; several replicas; clients that leave."""
    random = np.random.default_rng(seed)
    spec = spec_of(
        fields, int(random.integers(14, 60)), window_policy=str(random.choice(["boundary", "full", "exact-replay"])),
        tiers=TIERS[: int(random.integers(0, 3))],
    )  # fmt: skip
    sessions = random_sessions(seed, 25, outputs=300)
    ways = {"replicas": 1 + seed % 3, "routing": list(Routing)[seed % 4]}
    at_once, _ = simulated(spec, sessions, **ways)
    one_by_one, _ = simulated(spec, sessions, bulk=False, **ways)
    assert plain(at_once) == plain(one_by_one)
    assert len(at_once.requests) + at_once.skipped_turns == sum(len(s.turns) for s in sessions)


def test_the_same_trace_and_seed_give_the_same_result() -> None:
    speculation = Acceptance(Speculation(3, 2.5), seed=5)
    spec = spec_of(FLASH_LIKE, 30, tiers=TIERS, acceptance=speculation)
    first, _ = simulated(spec, random_sessions(1, 25), replicas=2)
    assert plain(first) == plain(simulated(spec, random_sessions(1, 25), replicas=2)[0])
    assert plain(first) != plain(simulated(spec, random_sessions(2, 25), replicas=2)[0])


def test_speculation_yields_as_many_tokens_a_step_as_was_said() -> None:
    for accepted in (1.5, 2.49, 3.4):
        spec = spec_of(FLASH_LIKE, 200, acceptance=Acceptance(Speculation(3, accepted), seed=1))
        sessions = [Session(f"s{i}", 100.0 * i, (Turn(((i, 50),), 1000 + i, 400),)) for i in range(60)]
        result, _ = simulated(spec, sessions)
        steps = result.replicas[0].steps - 60  # one of each prompt
        assert 399 * 60 / steps == pytest.approx(accepted, rel=0.06)
        assert result.requests.counts("output_tokens").tolist() == [400] * 60


def test_a_hit_in_a_lower_tier_takes_the_time_of_its_bandwidth() -> None:
    """A, then so much else that it is evicted, then A again: its rows come over the host's link."""
    config, spec = parse_model_config(FLASH_LIKE), spec_of(FLASH_LIKE, 18, window_policy="exact-replay")
    rows = 15 * unit_bytes(spec.groups, spec.layout)
    others = [Session(f"other{i}", 10.0 + 5 * i, (Turn(((10 + i, 2000),), 100 + i, 2),)) for i in range(3)]
    ask = Turn(((1, 15 * config.unit_tokens + 1),), 2, 2)
    first, again = Session("first", 0.0, (ask,)), Session("again", 50.0, (replace(ask, output=3),))
    rate = rows / 2  # two seconds
    slow = TierSpec("host", 10**9, rate, 1e12)
    result, _ = simulated(replace(spec, tiers=(slow,)), [first, *others, again])
    rows_by_name = dict(zip(result.requests.words("request"), result.requests.rows(), strict=True))
    row = dict(zip(result.requests.names(), rows_by_name["again"], strict=True))
    assert row["host_tokens"] + row["replayed_tokens"] >= 15 * config.unit_tokens and row["host_tokens"] > 0
    assert 2.0 <= row["started"] - row["arrived"] < 2.1


def test_refusals_and_what_follows_from_them() -> None:
    spec = spec_of(FLASH_LIKE, 20)
    spec = replace(spec, limits=replace(spec.limits, max_waiting=2))
    long = Session("long", 0.0, (Turn(((1, 4000),), 2, 5), Turn(((1, 10),), 3, 5)))
    crowd = [Session(f"c{i}", 1.0, (Turn(((5 + i, 100),), 50 + i, 20),)) for i in range(4)]
    result, _ = simulated(spec, [long, *crowd])
    ends = dict(zip(result.requests.words("request"), result.requests.words("finish"), strict=True))
    assert ends == {"long/0": "error", "c0": "length", "c1": "length", "c2": "error", "c3": "error"}
    assert result.skipped_turns == 1 and result.summary()["finished"] == {"error": 3, "length": 2}


def test_sticky_sessions_hit_where_round_robin_misses() -> None:
    spec = spec_of(FLASH_LIKE, 400)
    sessions = random_sessions(4, 30)
    rate = {r: simulated(spec, sessions, replicas=3, routing=r)[0].summary()["hit_rate"] for r in Routing}
    assert rate[Routing.STICKY] > rate[Routing.ROUND_ROBIN] and rate[Routing.PREFIX] > rate[Routing.ROUND_ROBIN]


def test_equal_prompts_queue_as_they_arrive() -> None:
    """Eight prompts of so many tokens at once: the last has its first token after eight times the time of one."""
    spec = spec_of(FLASH_LIKE, 400, max_num_batched_tokens=512)
    sessions = [Session(f"p{i}", i * 1e-6, (Turn(((i, 1500),), 100 + i, 1),)) for i in range(8)]
    result, _ = simulated(spec, sessions)
    alone, _ = simulated(spec, sessions[:1])
    first = float(alone.requests.seconds("first_token")[0])
    assert max(result.requests.seconds("first_token")) == pytest.approx(8 * first, rel=0.1)


def test_a_prompt_of_a_million_tokens_costs_its_chunks() -> None:
    config = load_model_config("flash")
    spec = replica_spec(ReplicaOptions(pool_memory=30 * 2**30, max_num_batched_tokens=8192), config)
    simulation = Simulation(spec, COST)
    result = simulation.run([Session("million", 0.0, (Turn(((0, 2**20 - 8),), 1, 4),))])
    half, seconds, past = 4096, 0.0, 0  # a long prompt leaves half of a step free for others
    while past < 2**20 - 8:
        new = min(half if 2**20 - 8 - past > 4 * 8192 else 8192, 2**20 - 8 - past)
        seconds += COST.seconds(StepWork(((new, past),)))
        past += new
    assert result.summary()["ttft_seconds"]["p50"] == pytest.approx(seconds)
    peaks = {p.group: p.peak_blocks for p in result.replicas[0].peaks}
    assert peaks["csa"] == peaks["hca"] == 2**20 // 128


def test_thousands_of_requests_take_seconds() -> None:
    config = load_model_config("flash")
    spec = replica_spec(ReplicaOptions(pool_memory=4 * 2**30, max_num_seqs=64, max_num_batched_tokens=8192), config)
    simulation = Simulation(spec, COST)
    began = time.process_time()
    result = simulation.run(workload_sessions("short-chat", 2500, seed=1, rate=0.5))
    seconds = time.process_time() - began
    assert len(result.requests) == 2500 and sum(result.summary()["evicted"].values()) > 0
    assert 2500 / seconds > LEAST_REQUESTS_PER_SECOND, f"{2500 / seconds:.0f} requests per second"
