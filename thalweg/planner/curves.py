"""What the report's pictures show, as numbers: surfaces, cliffs, ledgers and maps around one configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from thalweg.cache.geometry import cache_groups
from thalweg.cache.policy import exact_replay_tokens
from thalweg.errors import ConfigError
from thalweg.memory.capacity import checkpoint_bytes
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.planner.advice import Advice
from thalweg.planner.baselines import roofline_tables
from thalweg.planner.candidates import Candidate, rank_spec
from thalweg.planner.cost import StepCost, StepWork
from thalweg.planner.fitting import Array
from thalweg.planner.layout import ParallelLayout
from thalweg.planner.linear_cost import LinearCost
from thalweg.planner.memory_model import session_need
from thalweg.planner.platform import Platform
from thalweg.planner.simulator import Simulation
from thalweg.planner.step_cost import ModelStepCost
from thalweg.planner.trace import Session, Texts, conversation

HIT_RATES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
LOADS = (0.5, 0.8, 1.0, 1.25, 1.6, 2.4)  # of the sessions that a rank's pools hold
MOST_SESSIONS = 16  # that a rank holds in the picture of the cliff
SESSION_TOKENS = 65_536  # there, at most
PARETO_CONTEXTS = (2**13, 2**17, 2**19, 2**20)
STEP_CONTEXT = 131_072
RETENTION = 600.0  # seconds that a checkpoint is kept for its next use
_TURNS, _NEW, _OUTPUT, _PAUSE = 3, 512, 64, 10.0
_SWITCH = 0.05  # a time that falls by more while the context grows


def contexts_up_to(most: int) -> list[int]:
    """Powers of two from 4K."""
    return [2**n for n in range(12, 21) if 2**n <= most] or [most]


def prompt_seconds(cost: StepCost, chunk_tokens: int, new: int, past: int) -> float:
    """A prompt's new tokens in chunks, behind what is cached."""
    seconds = 0.0
    while new > 0:
        chunk = min(new, chunk_tokens)
        seconds += cost.seconds(StepWork(((chunk, past),), sampled=int(chunk == new)))
        past, new = past + chunk, new - chunk
    return seconds


def gaps(platform: Platform) -> dict[str, int]:
    """Cached tokens that are computed again at a hit that ends anywhere, on average, by window policy."""
    return {
        "full": platform.model.unit_tokens // 2,
        "interval:4096": 2048,
        "exact-replay": exact_replay_tokens(platform.model),
    }


def ttft_surface(platform: Platform, chosen: Candidate) -> dict[str, Array]:
    """Seconds by (hit rate, context), by window policy."""
    cost = platform.cost(chosen.layout, chosen.chunk_tokens, chosen.speculation)
    contexts = contexts_up_to(platform.model.max_position_embeddings)
    found = {}
    for policy, gap in gaps(platform).items():
        rows = []
        for hit in HIT_RATES:
            row = []
            for context in contexts:
                cached = max(0, int(context * hit) - gap)
                seconds = prompt_seconds(cost, chosen.chunk_tokens, context - cached, cached)
                row.append(seconds + platform.request_seconds)
            rows.append(row)
        found[policy] = np.array(rows)
    return found


@dataclass(frozen=True, slots=True)
class Cliff:
    """Hit rate and p90 first-token time of later turns over the load, by tiers: tokens of all sessions as a multiple of
    those that the device's pools hold. `knee`: the last load before the hit rate falls by a tenth, None if it never
    does."""

    capacity_tokens: int  # of the whole rank
    session_tokens: int
    loads: tuple[float, ...]
    hit_rates: dict[str, list[float]]
    ttft: dict[str, list[float]]
    knee: dict[str, float | None]


def capacity_cliff(platform: Platform, chosen: Candidate, host: int, disk: int) -> Cliff:
    """Simulated: sessions that take turns, pausing 10 s, on one rank, all of whose memories are cut alike to what
    16 sessions take: hits depend on ratios alone."""
    chosen = replace(chosen, max_num_seqs=MOST_SESSIONS, host_memory=0, disk_space=0)
    whole, room = rank_spec(platform, chosen)
    capacity = whole.limits.token_capacity
    tokens = max(4096, min(SESSION_TOKENS, capacity // MOST_SESSIONS))
    share = min(1.0, (tokens + _TURNS * _NEW) * MOST_SESSIONS / capacity)
    spec, _ = rank_spec(platform, chosen, pool_share=share)
    held = spec.limits.token_capacity / tokens
    counts = sorted({max(1, round(held * load)) for load in LOADS})
    host, disk = int((host or 2 * room.pool) * share), int((disk or 8 * room.pool) * share)
    cliff = Cliff(capacity, tokens, tuple(count / held for count in counts), {}, {}, {})
    cost = platform.cost(chosen.layout, chosen.chunk_tokens, chosen.speculation)
    for name, (in_host, on_disk) in {"device": (0, 0), "+ host": (host, 0), "+ host + disk": (host, disk)}.items():
        own, _ = rank_spec(platform, replace(chosen, host_memory=in_host, disk_space=on_disk), pool_share=share)
        points = []
        for count in counts:
            rows = Simulation(own, cost).run(_crowd(count, tokens)).requests
            later = np.array([not request.endswith("/0") for request in rows.words("request")], bool)
            cached = sum(rows.counts(f"{tier}_tokens")[later].sum() for tier in ("device", "host", "disk"))
            first = (rows.seconds("first_token") - rows.seconds("arrived"))[later] + platform.request_seconds
            points.append((float(cached / rows.counts("prompt_tokens")[later].sum()), float(np.quantile(first, 0.9))))
        cliff.hit_rates[name] = [hit for hit, _ in points]
        cliff.ttft[name] = [seconds for _, seconds in points]
        cliff.knee[name] = _knee(cliff.loads, cliff.hit_rates[name])
    return cliff


def _crowd(count: int, tokens: int) -> list[Session]:
    texts = Texts()
    first = tokens - _TURNS * (_NEW + _OUTPUT)
    asked = [(first, _OUTPUT, 0.0), *[(_NEW, _OUTPUT, _PAUSE)] * (_TURNS - 1)]
    return [Session(f"s{i}", 0.01 * i, conversation(texts, (), asked)) for i in range(count)]


def _knee(loads: Sequence[float], hits: Sequence[float]) -> float | None:
    for before, hit in zip(loads, hits[1:], strict=False):
        if hit < hits[0] - 0.1:
            return before
    return None


def ledger(platform: Platform, chosen: Candidate) -> tuple[list[int], dict[str, list[int]], list[int]]:
    """Contexts, bytes of one session by group, and what vLLM's pages would take of it."""
    layout = CacheLayout(RowFormat(platform.formats[0]), RowFormat(platform.formats[1]), platform.model.rope_dim)
    contexts = contexts_up_to(platform.model.max_position_embeddings)
    need = session_need(platform.model, "thalweg", 0, layout)
    groups = {g.name: [g.bytes(c) for c in contexts] for g in need.groups if g.bytes(contexts[-1])}
    pages = session_need(platform.model, "vllm", chosen.chunk_tokens, layout)
    return contexts, groups, [pages.bytes(c) for c in contexts]


@dataclass(frozen=True, slots=True)
class StepPart:
    """Seconds of a part of a step, the limit of the hardware, and what is odd about it."""

    name: str
    seconds: float
    limit: float | None
    flag: str = ""


def step_parts(platform: Platform, chosen: Candidate) -> dict[str, list[StepPart]]:
    """A whole chunk of a prompt, and a step of 16 decodes, both at 128K of context, by part."""
    cost = platform.cost(chosen.layout, chosen.chunk_tokens, None)
    works = {
        f"{chosen.chunk_tokens:,} prompt tokens": StepWork.prefill(chosen.chunk_tokens, STEP_CONTEXT),
        "16 decodes": StepWork.decode(16, STEP_CONTEXT),
    }
    if isinstance(cost, LinearCost):
        return {name: [StepPart(part, s, None) for part, s in cost.parts(work).items()] for name, work in works.items()}
    assert isinstance(cost, ModelStepCost), "the other cost there is"
    limits = ModelStepCost(platform.model, cost.deployment, roofline_tables())
    found = {}
    for name, work in works.items():
        bounds = limits.parts(work)
        found[name] = [
            StepPart(part, estimate.seconds, bounds[part].seconds, _flag(cost, part) if work.decodes else "")
            for part, estimate in cost.parts(work).items()
            if estimate.seconds
        ]
    return found


def _flag(cost: ModelStepCost, part: str) -> str:
    """Where a decode's time falls as its context grows: another kernel path, or odd rows."""
    before = 0.0
    for context in contexts_up_to(cost.model.max_position_embeddings):
        seconds = cost.parts(StepWork.decode(16, context))[part].seconds
        if seconds < before * (1 - _SWITCH):
            return f"path switch below {context // 1024:,}K"
        before = seconds
    return ""


def pareto(platform: Platform, chosen: Candidate) -> dict[int, list[tuple[float, float, str]]]:
    """By context: (tokens per second of a user, of a GPU, layout) that no other layout and batch beats in both."""
    found = {}
    for context in PARETO_CONTEXTS:
        if context > platform.model.max_position_embeddings:
            continue
        points = []
        for layout in _fitting(platform, chosen):
            cost = platform.cost(layout, chosen.chunk_tokens, None)
            most = _sessions(platform, replace(chosen, layout=layout), context)
            batch = 1
            while batch <= min(most, 256):
                step = cost.seconds(StepWork.decode(batch, context))
                points.append((1 / step, batch * layout.dp / step / layout.gpus, f"{layout}"))
                batch *= 2
        found[context] = frontier(points)
    return {context: points for context, points in found.items() if points}


def frontier(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those that no other beats in both figures, the fastest for a user last."""
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def _fitting(platform: Platform, chosen: Candidate) -> list[ParallelLayout]:
    found = []
    for layout in platform.layouts():
        try:
            rank_spec(platform, replace(chosen, layout=layout))
        except ConfigError:
            continue
        found.append(layout)
    return found


def _sessions(platform: Platform, candidate: Candidate, context: int) -> int:
    """Of a rank, of that length."""
    spec, room = rank_spec(platform, candidate)
    return room.pool // session_need(platform.model, "thalweg", 0, spec.layout).bytes(context)


def crossover(platform: Platform, chosen: Candidate, hit_rate: float) -> tuple[list[int], list[int], list[list[str]]]:
    """Contexts, concurrencies, and the layout on all GPUs that serves so many equal requests soonest (prompts first,
    then 500 tokens each); empty where none holds them."""
    contexts = contexts_up_to(platform.model.max_position_embeddings)
    counts = [1, 4, 16, 64, 256]
    layouts = _fitting(platform, chosen)
    most = {(layout, c): _sessions(platform, replace(chosen, layout=layout), c) for layout in layouts for c in contexts}

    def soonest(count: int, context: int) -> str:
        times = {}
        for layout in layouts:
            each = math.ceil(count / (layout.dp * (platform.gpus // layout.gpus)))
            if each <= most[layout, context]:
                cost = platform.cost(layout, chosen.chunk_tokens, None)
                past = int(context * hit_rate)
                prompts = each * prompt_seconds(cost, chosen.chunk_tokens, context - past, past)
                times[str(layout)] = prompts + 500 * cost.seconds(StepWork.decode(each, context))
        return min(times, key=lambda name: times[name]) if times else ""

    return contexts, counts, [[soonest(count, context) for context in contexts] for count in counts]


@dataclass(frozen=True, slots=True)
class PolicyCost:
    """One session under one window policy: bytes of its checkpoints, seconds that a hit adds, and after how many hits
    in ten minutes the bytes have paid (in rank seconds, against computing everything again; inf: never)."""

    policy: str
    checkpoint_bytes: int
    hit_seconds: float
    break_even: float


def policy_costs(advice: Advice, chosen: Candidate, tokens: int) -> list[PolicyCost]:
    """What checkpoints of a session of so many tokens cost and save. The rank's time is rented out by its pools'
    bytes: what a checkpoint displaces for ten minutes is charged."""
    platform = advice.platform
    spec, room = rank_spec(platform, chosen)
    cost = platform.cost(chosen.layout, chosen.chunk_tokens, None)
    each = checkpoint_bytes(cache_groups(platform.model), spec.layout)
    rows = room.pool / max(1, spec.limits.token_capacity) * tokens  # compressed rows and their share of checkpoints
    whole = prompt_seconds(cost, chosen.chunk_tokens, tokens, 0)
    unit = platform.model.unit_tokens
    kept = {"full": tokens // unit, "interval:4096": tokens // 4096, "boundary/0": 2, "exact-replay": 0}
    gap = gaps(platform) | {"boundary/0": 0}
    found = []
    for policy, count in kept.items():
        size = count * each
        extra = prompt_seconds(cost, chosen.chunk_tokens, gap[policy], tokens - gap[policy]) if gap[policy] else 0.0
        rent = (rows + size) / room.pool * RETENTION * chosen.layout.gpus / max(1, chosen.layout.dp)
        saved = (whole - extra) * chosen.layout.gpus / max(1, chosen.layout.dp)
        found.append(PolicyCost(policy, size, extra, rent / saved if saved > 0 else math.inf))
    found.append(PolicyCost("recompute", 0, whole, 0.0))
    return found
