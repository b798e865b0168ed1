"""A measured endpoint (`thalweg profile`) as the planner sees it: step times and pools from its cells, and how well
they foretell what was held out: single requests, and loads that no fit has seen.

Fitted: first-token times are a constant per request (network, tokenizer) and one prompt part behind its cached
beginning; times per token are steps of so many decodes. Loads are replayed by the real scheduler on the virtual clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from thalweg.cache.geometry import cache_groups
from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError
from thalweg.memory.capacity import plan_cache
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.planner.accuracy import Score, Trial, score
from thalweg.planner.cost import Estimate, Origin, StepWork
from thalweg.planner.linear_cost import LinearCost, step_terms
from thalweg.planner.platform import MeasuredEndpoint
from thalweg.planner.simulator import Simulation
from thalweg.planner.spec import ReplicaOptions, replica_spec
from thalweg.planner.trace import Session, Texts, Turn
from thalweg.profiler.profile import Load, Profile, TpotCell, TtftCell
from thalweg.profiler.surface import Estimate as Reading

FORMATS = ("float32", "float32")  # of our CPU engine's rows, where a profile does not say
RUNNING, CHUNK_TOKENS = 16, 1024  # the defaults of `serve`; from outside they do not show
_DOCUMENTS = 4  # that a measured load shares among its requests
_LIKELY = (0.1, 0.9)


@dataclass(frozen=True, slots=True)
class EndpointCost:
    """What was fitted: steps, and seconds of a request outside of them."""

    steps: LinearCost
    request_seconds: float

    def ttft(self, cell: TtftCell) -> Estimate:
        """To the first token of such a prompt, alone."""
        own = self.steps.estimate(_prompt(cell))
        extra = self.request_seconds
        return Estimate(own.seconds + extra, own.low + extra * self.steps.low, own.high + extra * self.steps.high,
                        own.origin)  # fmt: skip

    def tpot(self, cell: TpotCell) -> Estimate:
        """Of each of so many decodes."""
        return self.steps.estimate(StepWork.decode(cell.batch, cell.context_tokens))


def fitted_cost(profile: Profile) -> EndpointCost:
    """Through the cells of a profile; held-out ones are not looked at. Raises ConfigError where they are too few."""
    if len(profile.ttft_cells) < 3 or len(profile.tpot_cells) < 2:
        raise ConfigError(
            f"profile: {len(profile.ttft_cells)} cells of first-token times and {len(profile.tpot_cells)} of times per "
            "token; at least 3 and 2 are needed: run `thalweg profile` with its surfaces stage",
            param="profile",
        )
    prompts = [(_prompt(c), c.typical_seconds, 1.0) for c in profile.ttft_cells]
    decodes = [(StepWork.decode(c.batch, c.context_tokens), c.typical_seconds, 0.0) for c in profile.tpot_cells]
    measured = [*prompts, *decodes]
    rows = np.array([(*step_terms(work), request) for work, _, request in measured])
    times = np.array([seconds for _, seconds, _ in measured])
    scaled = rows / times[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    found = nnls(scaled / norms, np.ones(len(times)))[0] / norms
    low, high = (float(q) for q in np.quantile(times / np.maximum(rows @ found, 1e-12), _LIKELY))
    step, token, token_context, decode, decode_context, request = (float(c) for c in found)
    contexts = [c.context_tokens for c in profile.ttft_cells] + [c.context_tokens for c in profile.tpot_cells]
    deepest = max(contexts)
    steps = LinearCost(
        step, token, token_context, decode, decode_context, min(low, 1.0), max(high, 1.0), deepest, deepest
    )
    return EndpointCost(steps, request)


def _prompt(cell: TtftCell) -> StepWork:
    cached = cell.cached_tokens
    cached = round(cell.context_tokens * cell.reuse) if cached is None else cached
    cached = min(cached, cell.context_tokens - 1)
    return StepWork.prefill(cell.context_tokens - cached, cached)


def measured_endpoint(path: Path, model: ModelConfig, gpus: int, pool_memory: int | None = None) -> MeasuredEndpoint:
    """The endpoint of a profile.json, as a platform. Raises ConfigError naming what the profile lacks."""
    profile = Profile.load(path)
    pool = pool_memory or pool_of(profile, model)
    cost = fitted_cost(profile)
    scores = [s for s in endpoint_scores(profile, model, pool) if ":" not in s.slice]
    endpoint = profile.endpoint
    name = f"{endpoint.model} at {endpoint.url}" if gpus == 1 else f"{gpus} x {endpoint.model} at {endpoint.url}"
    return MeasuredEndpoint(
        model, name, cost.steps, pool, FORMATS, gpus, request_seconds=cost.request_seconds, scores=tuple(scores)
    )


def pool_of(profile: Profile, model: ModelConfig) -> int:
    """Bytes of pools that hold the tokens which the endpoint states, or was seen to hold. Raises ConfigError."""
    held = profile.capacity_tokens()
    tokens = profile.endpoint.stated_capacity_tokens or (int(held.value) if held else None)
    if not tokens:
        raise ConfigError("pool_memory: the profile tells no capacity of the cache; give it", param="pool_memory")
    groups = cache_groups(model)
    layout = CacheLayout(RowFormat(FORMATS[0]), RowFormat(FORMATS[1]), model.rope_dim)
    low, high = 0, 1 << 50
    while high - low > 1 << 12:
        middle = (low + high) // 2
        try:
            enough = plan_cache(groups, layout, budget_bytes=middle, max_running=RUNNING).token_capacity >= tokens
        except ConfigError:
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    return high


def endpoint_scores(profile: Profile, model: ModelConfig, pool_memory: int | None = None) -> list[Score]:
    """Errors on what no fit saw: held-out cells, by the profile's own surfaces and by the planner's
    fit, and loads. Each load is a slice of its own beside the sums."""
    cost = fitted_cost(profile)
    held = profile.holdout
    surface = [(o.what, Trial(o.where, o.measured, _ours(o.predicted))) for o in profile.outcomes()]
    ttft = [Trial(_where(c), c.typical_seconds, cost.ttft(c)) for c in held.ttft]
    tpot = [Trial(f"batch {c.batch}", c.typical_seconds, cost.tpot(c)) for c in held.tpot]
    scores = [
        score("profile", f"{what} held out", [trial for kind, trial in surface if kind == what])
        for what in ("ttft", "tpot", "capacity")
    ]
    scores += [score("planner", "ttft held out", ttft), score("planner", "tpot held out", tpot)]
    loads = list(_load_trials(profile, model, cost, pool_memory)) if profile.loads else []
    for quantity in ("ttft p50", "tpot p50", "requests/s"):
        found = [trial for name, trial in loads if name == quantity]
        scores.append(score("load", quantity, found))
        scores += [score("load", f"{quantity}: {trial.what}", [trial]) for trial in found]
    return [s for s in scores if s]


def _where(cell: TtftCell) -> str:
    return f"{cell.context_tokens:,} tokens, {cell.reuse:.0%} reused"


def _ours(found: Reading) -> Estimate:
    high = found.value if found.high is None else found.high
    return Estimate(found.value, found.low, high, Origin(found.tag.value))


def _load_trials(
    profile: Profile, model: ModelConfig, cost: EndpointCost, pool_memory: int | None
) -> Iterator[tuple[str, Trial]]:
    """(quantity, measured and simulated) of every load."""
    options = ReplicaOptions(pool_memory or pool_of(profile, model), RUNNING, CHUNK_TOKENS, None, *FORMATS)
    spec = replica_spec(options, model)
    for load in profile.loads:
        where = f"{load.concurrency} at once" if load.concurrency else f"{load.rate or 0:.2f}/s"
        simulated = Simulation(spec, cost.steps).run(load_sessions(load, cost.request_seconds))
        rows = simulated.requests
        own = np.array([not name.startswith("document") for name in rows.words("request")], bool)
        arrived, first, ended = (rows.seconds(n)[own] for n in ("arrived", "first_token", "finished"))
        paces = (ended - first) / np.maximum(1, rows.counts("output_tokens")[own] - 1)
        shares = (cost.steps.low, cost.steps.high)
        values = {
            "ttft p50": (np.median(load.ttft_seconds), np.median(first - arrived) + cost.request_seconds),
            "tpot p50": (np.median(load.tpot_seconds), np.median(paces)),
            "requests/s": (load.requests / load.seconds, own.sum() / (ended.max() - arrived.min())),
        }
        for quantity, (measured, predicted) in values.items():
            low, high = (predicted * share for share in shares)
            yield quantity, Trial(where, float(measured), Estimate(float(predicted), low, high, Origin.EXTRAPOLATED))


def load_sessions(load: Load, request_seconds: float = 0.0) -> Iterator[Session]:
    """A measured load as a trace: documents that were asked before, and questions of their own behind them."""
    texts, draws = Texts(), random.Random(0)
    shared = round(load.context_tokens * load.reuse)
    documents = [texts.new() for _ in range(_DOCUMENTS)]
    for i, text in enumerate(documents):
        yield Session(f"document{i}", 0.0, (Turn(((text, shared),), texts.new(), 1),))
    begin = 3600.0

    def turn() -> Turn:
        pieces = ((draws.choice(documents), shared), (texts.new(), load.context_tokens - shared))
        return Turn(pieces, texts.new(), load.output_tokens, pause=request_seconds)

    if load.concurrency:
        for i in range(load.concurrency):
            count = load.requests // load.concurrency + (i < load.requests % load.concurrency)
            if count:
                yield Session(f"client{i}", begin, tuple(turn() for _ in range(count)))
        return
    assert load.rate, "a load has a concurrency or a rate"
    for i in range(load.requests):
        begin += draws.expovariate(load.rate)
        yield Session(f"request{i}", begin, (turn(),))
