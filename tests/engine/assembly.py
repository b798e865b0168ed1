"""Real engines over small random models, and a runner without a model for tests of scheduling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import cache_groups
from thalweg.cache.policy import CheckpointPolicy, WindowPolicy, bounded_replay_tokens, exact_replay_tokens
from thalweg.cache.prefix_index import Namespace
from thalweg.checkpoint.random_model import random_parameters
from thalweg.config.model_parse import parse_model_config
from thalweg.engine.batch import BatchBuilder
from thalweg.engine.engine import Engine
from thalweg.engine.limits import EngineLimits
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.request import Sequence
from thalweg.engine.runner import ModelRunner, Runner, steps_of
from thalweg.engine.sampler import Sampler
from thalweg.engine.scheduler import Scheduler, SchedulerLimits
from thalweg.engine.shadow import Shadow
from thalweg.engine.tiering import Tiering
from thalweg.errors import GrammarError
from thalweg.kernels.registry import select_kernels
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import CachePlan, plan_cache
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.memory.packing import BlockPacker
from thalweg.memory.tier import Tier
from thalweg.memory.transfers import Transfers
from thalweg.model.graphs import StepLimits
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model
from thalweg.types import Event, GenerateRequest, PrefillProgress, SampledToken, SamplingParams, TokenEvent

EOS = 1


@dataclass(frozen=True)
class Shape:
    """How an engine is laid out."""

    max_running: int = 8
    max_step_tokens: int = 256
    cache_bytes: int = 60_000_000
    checkpoint_interval: int = 256
    prefix_caching: bool = True
    simulate_quantization: bool = False
    policy: WindowPolicy = WindowPolicy.BOUNDARY
    replay: bool = True
    deterministic: bool = False
    kernels: str = "auto"
    kv: RowFormat = RowFormat.FLOAT32
    index: RowFormat = RowFormat.FLOAT32


def prompt_of(seed: int, length: int) -> list[int]:
    """Random token ids of the small models, none of them a control token."""
    return np.random.default_rng(seed).integers(2, 97, length).tolist()


class Models:
    """Random models by config, made once."""

    def __init__(self) -> None:
        self._weights: dict[str, dict[str, torch.Tensor]] = {}

    def runner(
        self, fields: dict[str, Any], shape: Shape, sampler: Sampler | None = None
    ) -> tuple[ModelRunner, CachePlan]:
        config = parse_model_config(fields)
        key = repr(sorted(fields.items(), key=lambda item: item[0]))
        if key not in self._weights:
            self._weights[key] = {p.name: value for p, value in random_parameters(config, 3)}
        device = torch.device("cpu")
        groups = cache_groups(config)
        layout = CacheLayout(shape.kv, shape.index, config.rope_dim)
        plan = plan_cache(groups, layout, budget_bytes=shape.cache_bytes, max_running=shape.max_running)
        numerics = Numerics.serving(torch.float32, shape.kv, shape.index, simulate=shape.simulate_quantization)
        kernels = select_kernels(device, deterministic=shape.deterministic, wanted=shape.kernels)
        model = Model(config, dict(self._weights[key]), numerics, kernels.kernels)
        arena = CacheArena(plan, device)
        steps = steps_of(model, arena, kernels, StepLimits(shape.max_running, 1 << 20))
        return ModelRunner(steps, arena, BatchBuilder(config, groups), sampler or Sampler((EOS,))), plan


class RecordingSampler(Sampler):
    """Keeps every row of logits, by request and by the number of tokens that it follows."""

    def __init__(self) -> None:
        super().__init__((EOS,))
        self.rows: dict[str, dict[int, torch.Tensor]] = {}

    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence], seeds: list[int]
    ) -> list[SampledToken | GrammarError]:
        for row, sequence in zip(logits, sequences, strict=True):
            self.rows.setdefault(sequence.request_id, {})[len(sequence)] = row.clone()
        return super().sample(logits, sequences, seeds)


def engine_of(
    fields: dict[str, Any],
    runner: Runner,
    plan: CachePlan,
    shape: Shape,
    *,
    shadow: Shadow | None = None,
    tiers: Mapping[str, Tier] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """An engine, started. Tiers need a runner with an arena."""
    config = parse_model_config(fields)
    bounded = shape.policy is WindowPolicy.BOUNDED_REPLAY
    replay = bounded_replay_tokens(config) if bounded else exact_replay_tokens(config) if shape.replay else 0
    policy = CheckpointPolicy(config.unit_tokens, shape.checkpoint_interval, shape.policy, replay)

    def make_scheduler() -> Scheduler:
        coordinator = Coordinator(plan.groups, plan.pool_blocks, policy, prefix_caching=shape.prefix_caching)
        limits = SchedulerLimits(shape.max_running, shape.max_step_tokens)
        mover = Transfers(BlockPacker(runner.arena), tiers) if tiers and isinstance(runner, ModelRunner) else None
        tiering = Tiering(coordinator, tiers or {}, mover, clock)
        return Scheduler(tiering, limits, lambda sequence: Namespace(sequence.request.cache_salt.encode()))

    engine_limits = EngineLimits(1 << 20, plan.token_capacity, config.vocab_size, 64, (EOS,))
    engine = Engine(make_scheduler, runner, engine_limits, shadow=shadow, clock=clock)
    engine.start()
    return engine


@dataclass
class Outcome:
    """Everything that one request was told."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.started.set()
        if isinstance(event, TokenEvent) and event.finish is not None:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [t.token for e in self.events if isinstance(e, TokenEvent) for t in e.tokens]

    @property
    def last(self) -> TokenEvent:
        event = self.events[-1]
        assert isinstance(event, TokenEvent) and event.finish is not None
        return event

    @property
    def progress(self) -> list[int]:
        return [e.done_tokens for e in self.events if isinstance(e, PrefillProgress)]


def submit(engine: Engine, name: str, prompt: SequenceOf[int], **sampling: Any) -> Outcome:
    outcome = Outcome()
    salt, rules = sampling.pop("cache_salt", ""), sampling.pop("rules", None)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling})
    engine.submit(GenerateRequest(name, np.array(prompt, np.int32), params, cache_salt=salt, rules=rules), outcome)
    return outcome


def answer(engine: Engine, name: str, prompt: SequenceOf[int], **sampling: Any) -> Outcome:
    """Submit and wait for the end."""
    outcome = submit(engine, name, prompt, **sampling)
    assert outcome.done.wait(60), "no terminal event"
    return outcome


class CountingRunner:
    """A runner without a model: each output token is the number of tokens so far, modulo a vocabulary."""

    def __init__(self, vocabulary: int = 90) -> None:
        self.plans: list[tuple[tuple[str, int, int, bool], ...]] = []
        self.fail_at: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self._vocabulary = vocabulary

    def run(self, plan: StepPlan) -> StepResult:
        self.gate.wait(30)
        self.plans.append(plan.description())
        if len(self.plans) in self.fail_at:
            raise RuntimeError("injected failure")
        sampling = [item for item in plan.sequences if item.samples]
        return StepResult({i.request_id: SampledToken(2 + i.end % (self._vocabulary - 2)) for i in sampling})


MODELS = Models()


def model_engine(fields: dict[str, Any], shape: Shape, units: int = 0, **rest: Any) -> Engine:
    """An engine over a random model, started; with `units`, its compressed pools hold only so many."""
    runner, plan = MODELS.runner(fields, shape, rest.pop("sampler", None))
    if units:
        small = {spec.group: (units if spec.compressed else plan.pool_blocks[spec.group]) for spec in plan.groups}
        plan = CachePlan(plan.groups, plan.layout, small, plan.max_running)
    return engine_of(fields, runner, plan, shape, **rest)


def cold_outcomes(fields: dict[str, Any], prompts: SequenceOf[SequenceOf[int]], **sampling: Any) -> list[Outcome]:
    """Each prompt alone, in one chunk, without any cache."""
    engine = model_engine(fields, Shape(max_step_tokens=1024, prefix_caching=False))
    outcomes = [answer(engine, str(i), prompt, **sampling) for i, prompt in enumerate(prompts)]
    engine.close()
    return outcomes


def cold_answers(fields: dict[str, Any], prompts: SequenceOf[SequenceOf[int]], **sampling: Any) -> list[list[int]]:
    """The tokens of `cold_outcomes`."""
    return [outcome.tokens for outcome in cold_outcomes(fields, prompts, **sampling)]
