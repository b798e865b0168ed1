"""Which configuration to run: candidates that fit, the best few of them simulated at the load, in order.

Ranked by: objectives met; then dollars per completed task (or GPUs, without a price); then how far from the objectives,
or the first-token time. Around the best layout one choice at a time is changed (step budget, window policy, tiers,
speculation) and simulated too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from thalweg.planner.candidates import (
    MOST_BUSY,
    Candidate,
    Refusal,
    Sketch,
    Split,
    proof,
    rank_spec,
    sketch,
    sketches,
    split_sketch,
    unfit,
)
from thalweg.planner.cost import Estimate, Origin, StepCost, StepWork, total
from thalweg.planner.demand import Demand
from thalweg.planner.layout import Speculation
from thalweg.planner.memory_model import session_need
from thalweg.planner.outcome import SimulationResult
from thalweg.planner.platform import Platform, origin_shares
from thalweg.planner.routing import Routing
from thalweg.planner.simulator import Simulation

SAME = 0.02  # costs that differ by less are the same


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits in seconds at a percentile of requests; None: no limit."""

    ttft: float | None = None
    tpot: float | None = None
    percentile: float = 90.0


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked beside platform and demand. Bytes are of a rank; `price` is dollars per GPU hour."""

    objectives: Objectives = Objectives()
    price: float | None = None
    host_memory: int = 0
    disk_space: int = 0
    speculation: Speculation | None = None
    simulated: int = 4  # layouts
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """A figure, with the ends that it takes when all steps are at the low or at the high end of their intervals."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One simulated configuration. Seconds and tokens; `missed` names the objectives that fail and by how much."""

    candidate: Candidate
    proof: Mapping[str, int]
    pool_bytes: int
    token_capacity: int  # of a rank
    sessions: int  # of the median request's length, that all ranks hold at once
    ttft: Span
    tpot: Span
    hit_rate: float
    attained: float  # share of requests within both limits
    output_rate: float  # tokens per second, all GPUs
    busy: float  # the closed form, with the hits of the simulation
    preemptions: int
    evicted: int
    task_gpu_seconds: float  # at the load's rate, idle time included
    task_dollars: float | None
    origins: Mapping[Origin, float]
    missed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    result: SimulationResult | None = field(default=None, compare=False, repr=False)

    @property
    def bottleneck(self) -> str:
        """What would be missed first."""
        if self.missed:
            return self.missed[0]
        if self.evicted:
            return "cache room: evictions"
        return f"time: full batches would take {self.busy:.0%} of it"


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer, best first. `layouts` are the closed forms that the search began with."""

    platform: Platform
    demand: Demand
    question: Question
    verdicts: tuple[Verdict, ...]
    refused: tuple[Refusal, ...]
    layouts: tuple[Sketch, ...]
    split: Split | None = None

    @property
    def best(self) -> Verdict | None:
        return self.verdicts[0] if self.verdicts else None

    @property
    def sure(self) -> Verdict | None:
        """The best of those that rest on nothing unclaimed, if that is another one."""
        found = next((verdict for verdict in self.verdicts if not verdict.notes), None)
        return None if found is self.best else found


class ScaledCost:
    """Another cost, times a factor: an end of its interval."""

    def __init__(self, cost: StepCost, factor: float) -> None:
        self._cost, self._factor = cost, factor

    def seconds(self, work: StepWork) -> float:
        return self._cost.seconds(work) * self._factor

    def estimate(self, work: StepWork) -> Estimate:
        return self._cost.estimate(work) * self._factor


def advise(
    platform: Platform, demand: Demand, question: Question, progress: Callable[[str], None] | None = None
) -> Advice:
    """Search as the module says. `progress` hears what is simulated next. Raises ConfigError for wrong values."""
    say = progress or _quiet
    chunk = platform.chunks()[0]
    first = Candidate(platform.layouts()[0], 1, chunk, host_memory=question.host_memory,
                      max_num_seqs=min(64, max(16, chunk // 128)))  # fmt: skip
    found, refused = sketches(platform, demand, first)
    verdicts: list[Verdict] = []
    for item in sorted(found, key=lambda s: _sketch_order(s, question))[: question.simulated]:
        say(str(item.candidate))
        verdicts.append(evaluate(platform, demand, question, item.candidate))
    if verdicts:
        base = min(verdicts, key=lambda v: order(v, question)).candidate
        for candidate in _variants(platform, base, question):
            refusal = unfit(platform, candidate, demand)
            if refusal is not None:
                refused.append(refusal)
                continue
            say(str(candidate))
            verdicts.append(evaluate(platform, demand, question, candidate))
    ranked = sorted(verdicts, key=lambda v: order(v, question))
    if ranked:
        say("the interval of the best")
        ranked[0] = _with_span(platform, demand, question, ranked[0])
    return Advice(
        platform, demand, question, tuple(ranked), tuple(refused), tuple(found), split_sketch(platform, demand, chunk)
    )


def _quiet(what: str) -> None:
    """Nobody watches."""


def _sketch_order(item: Sketch, question: Question) -> tuple[float, ...]:
    goals = question.objectives
    late = max(0.0, item.ttft / goals.ttft - 1) if goals.ttft else 0.0
    slow = max(0.0, item.tpot / goals.tpot - 1) if goals.tpot else 0.0
    return late + slow, max(0.0, item.busy - MOST_BUSY), item.candidate.gpus, item.ttft + item.tpot


def _variants(platform: Platform, base: Candidate, question: Question) -> Iterator[Candidate]:
    """One choice at a time around a configuration."""
    for chunk in platform.chunks():
        if chunk != base.chunk_tokens and chunk > base.max_num_seqs:
            yield replace(base, chunk_tokens=chunk)
    for policy, interval in (("boundary", 0), ("full", 4096), ("interval:4096", 4096), ("exact-replay", 4096)):
        yield replace(base, window_policy=policy, checkpoint_interval=interval)
    if question.host_memory:
        yield replace(base, host_memory=0)
    if question.disk_space:
        yield replace(base, disk_space=question.disk_space)
    if question.speculation:
        yield replace(base, speculation=question.speculation)


def order(verdict: Verdict, question: Question) -> tuple[float, ...]:
    """Small is good: objectives missed, cost per task in steps of 2%, first-token time, time per token."""
    goals = question.objectives
    missed = 0.0
    for span, limit in ((verdict.ttft, goals.ttft), (verdict.tpot, goals.tpot)):
        missed += max(0.0, span.value / limit - 1) if limit else 0.0
    cost = round(np.log(max(verdict.task_gpu_seconds, 1e-9)) / SAME)
    return missed, float(cost), verdict.ttft.value + verdict.tpot.value


def simulate(
    platform: Platform, demand: Demand, candidate: Candidate, factor: float = 1.0, seed: int = 0
) -> SimulationResult:
    """The demand through a configuration, all steps taking so many times their price."""
    spec, _ = rank_spec(platform, candidate, seed)
    cost: StepCost = platform.cost(candidate.layout, candidate.chunk_tokens, candidate.speculation)
    if factor != 1.0:
        cost = ScaledCost(cost, factor)
    return Simulation(spec, cost, replicas=candidate.ranks, routing=Routing.PREFIX).run(demand.sessions)


def evaluate(platform: Platform, demand: Demand, question: Question, candidate: Candidate) -> Verdict:
    """Simulate one configuration and say what it comes to."""
    spec, room = rank_spec(platform, candidate, question.seed)
    cost = platform.cost(candidate.layout, candidate.chunk_tokens, candidate.speculation)
    result = simulate(platform, demand, candidate, seed=question.seed)
    ttft, tpot, attained = figures(result, question.objectives, platform.request_seconds)
    works = typical_steps(demand, candidate)
    low, high = _ends(cost, works)
    summary = result.summary()
    hits = summary["hit_rate"] or 0.0
    busy = sketch(cost, candidate, replace(demand, reused_tokens=hits * demand.prompt_tokens)).busy
    gpu_seconds = candidate.gpus / demand.session_rate * max(1.0, busy)
    need = session_need(platform.model, "thalweg", 0, spec.layout).bytes(demand.typical_tokens)
    return Verdict(
        candidate=candidate,
        proof=proof(spec, room),
        pool_bytes=room.pool,
        token_capacity=spec.limits.token_capacity,
        sessions=candidate.ranks * int(room.pool // need),
        ttft=Span(ttft, ttft * low, ttft * high),
        tpot=Span(tpot, tpot * low, tpot * high),
        hit_rate=hits,
        attained=attained,
        output_rate=summary["output_tokens_per_second"] or 0.0,
        busy=busy,
        preemptions=summary["preemptions"],
        evicted=sum(summary["evicted"].values()),
        task_gpu_seconds=gpu_seconds,
        task_dollars=None if question.price is None else gpu_seconds * question.price / 3600,
        origins=origin_shares(cost, works),
        missed=_missed(ttft, tpot, question.objectives),
        notes=_notes(candidate, summary),
        result=result,
    )


def figures(
    result: SimulationResult, objectives: Objectives, request_seconds: float = 0.0
) -> tuple[float, float, float]:
    """First-token time and time per token at the percentile, and the share of requests within both limits. A request
    that did not end took for ever."""
    rows = result.requests
    done = np.array([word == "length" for word in rows.words("finish")], bool)
    first, arrived, ended = (rows.seconds(n) for n in ("first_token", "arrived", "finished"))
    outputs = rows.counts("output_tokens")
    ttft = np.where(done, first - arrived + request_seconds, np.inf)
    tpot = np.where(done, (ended - first) / np.maximum(1, outputs - 1), np.inf)
    place = objectives.percentile / 100
    within = np.ones(len(rows), bool)
    if objectives.ttft:
        within &= ttft <= objectives.ttft
    if objectives.tpot:
        within &= tpot <= objectives.tpot
    at = [float(np.quantile(values, place, method="higher")) for values in (ttft, tpot)]
    return at[0], at[1], float(within.mean())


def typical_steps(demand: Demand, candidate: Candidate) -> dict[StepWork, float]:
    """What a rank mostly computes, weighted by how often per request: a prompt's chunk behind its cached beginning, the
    last chunk of the longest prompt, a decode step."""
    chunk = int(min(candidate.chunk_tokens, demand.new_tokens))
    past = int(demand.prompt_tokens - demand.new_tokens)
    each = 1 + candidate.speculation.drafts if candidate.speculation else 1
    yields = candidate.speculation.accepted if candidate.speculation else 1.0
    context = int(demand.prompt_tokens + demand.output_tokens / 2)
    longest = max(0, demand.longest_tokens - candidate.chunk_tokens)
    works = {StepWork.prefill(chunk, past): demand.new_tokens / chunk}
    works[StepWork.decode(4, context, each)] = demand.output_tokens / yields / 4
    works[StepWork.prefill(candidate.chunk_tokens, longest)] = 1 / max(1, demand.requests)
    return works


def _ends(cost: StepCost, works: Mapping[StepWork, float]) -> tuple[float, float]:
    """The interval of typical steps as shares of their time."""
    whole = total(cost.estimate(work) * weight for work, weight in works.items())
    return (whole.low / whole.seconds, whole.high / whole.seconds) if whole.seconds else (1.0, 1.0)


def _with_span(platform: Platform, demand: Demand, question: Question, verdict: Verdict) -> Verdict:
    """The same with intervals from simulations in which every step is at an end of its interval: queues grow faster."""
    cost = platform.cost(verdict.candidate.layout, verdict.candidate.chunk_tokens, verdict.candidate.speculation)
    ends = []
    for factor in _ends(cost, typical_steps(demand, verdict.candidate)):
        result = simulate(platform, demand, verdict.candidate, factor, question.seed)
        ends.append(figures(result, question.objectives, platform.request_seconds)[:2])
    (ttft_low, tpot_low), (ttft_high, tpot_high) = ends
    return replace(
        verdict,
        ttft=Span(verdict.ttft.value, min(ttft_low, verdict.ttft.value), max(ttft_high, verdict.ttft.value)),
        tpot=Span(verdict.tpot.value, min(tpot_low, verdict.tpot.value), max(tpot_high, verdict.tpot.value)),
    )


def _missed(ttft: float, tpot: float, goals: Objectives) -> tuple[str, ...]:
    return tuple(
        f"{name} p{goals.percentile:g} is {value:.3g} s, {value - limit:.3g} s over {limit:g} s"
        for name, value, limit in (("TTFT", ttft, goals.ttft), ("TPOT", tpot, goals.tpot))
        if limit and value > limit
    )


def _notes(candidate: Candidate, summary: Mapping[str, object]) -> tuple[str, ...]:
    """Where the cost model does not claim what it says."""
    notes = []
    if candidate.layout.dp > 1:
        notes.append("data parallel ranks step together in a real engine; times per token under them are not claimed")
    if candidate.layout.cp > 1:
        notes.append("no context parallel engine was measured: its gathers are priced, its engine is not claimed")
    if candidate.speculation:
        notes.append("accepted drafts are as you say; no measurement of yours")
    return tuple(notes)
