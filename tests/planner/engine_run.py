"""The real engine with a real model, on a virtual clock: what the simulator must agree with.

The runner computes each step, then moves the clock by what the step costs and hands over whatever is asked by then.
Outputs are forced to be those that the trace says, so that later turns contain them.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from tests.engine.assembly import EOS, MODELS, Shape
from tests.planner.copying_mover import CopyingMover
from thalweg.cache.coordinator import Coordinator
from thalweg.cache.policy import CheckpointPolicy, exact_replay_tokens
from thalweg.cache.prefix_index import Namespace
from thalweg.config.model_parse import parse_model_config
from thalweg.engine.engine import Engine
from thalweg.engine.limits import EngineLimits
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.scheduler import Scheduler, SchedulerLimits
from thalweg.engine.tiering import Tiering
from thalweg.memory.capacity import CachePlan
from thalweg.memory.packing import BlockPacker
from thalweg.planner.cost import SequenceWork, StepCost, StepWork
from thalweg.planner.replica import ReplicaSpec
from thalweg.planner.sim_tiers import Agenda, TierSpec, VirtualClock
from thalweg.planner.tokens import Piece
from thalweg.planner.trace import Session
from thalweg.types import AllowedTokens, Event, GenerateRequest, SamplingParams, TokenArray, TokenEvent

Plans = list[tuple[float, tuple[tuple[str, int, int, bool], ...]]]


def tokens_of(pieces: tuple[Piece, ...]) -> TokenArray:
    """Random ids, the same for the same place of the same text."""
    parts = [np.random.default_rng(text).integers(2, 97, tokens, np.int32) for text, tokens in pieces]
    return np.concatenate(parts)


class Forced:
    """Rules of an output that is known beforehand."""

    def __init__(self, tokens: TokenArray) -> None:
        self._tokens = tokens

    def start(self) -> Forced:
        return self

    def allowed(self, output: TokenArray) -> AllowedTokens:
        return AllowedTokens(forced=int(self._tokens[len(output)]))

    def ends_with(self, token: int) -> bool:
        return False


class _Steps:
    """The runner of such an engine."""

    def __init__(self, owner: EngineRun) -> None:
        self._owner = owner

    def run(self, plan: StepPlan) -> StepResult:
        return self._owner.run_step(plan)


class EngineRun:
    """One run of a trace. `plans` has the beginning and the content of every step."""

    def __init__(
        self, fields: dict[str, Any], shape: Shape, units: int, cost: StepCost, tiers: tuple[TierSpec, ...] = ()
    ) -> None:
        self.inner, plan = MODELS.runner(fields, shape)
        small = {spec.group: (units if spec.compressed else plan.pool_blocks[spec.group]) for spec in plan.groups}
        self.plan = CachePlan(plan.groups, plan.layout, small, plan.max_running)
        self.clock, self.cost = VirtualClock(), cost
        self.plans: Plans = []
        self.ends: dict[str, tuple[float, str, int, int, int]] = {}  # when, why, tokens of device, host, output
        self._tiers, self._agenda = tiers, Agenda()
        self._mover: CopyingMover | None = None
        if tiers:
            packer = BlockPacker(self.inner.arena)
            self._mover = CopyingMover(packer, self.clock, self._agenda, plan.groups, plan.layout, tiers)
        self.engine = self._engine(self.spec(fields, shape))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = self._open = 0
        self._done = threading.Event()

    def spec(self, fields: dict[str, Any], shape: Shape) -> ReplicaSpec:
        """The same for the simulator."""
        config = parse_model_config(fields)
        policy = CheckpointPolicy(
            config.unit_tokens, shape.checkpoint_interval, shape.policy, exact_replay_tokens(config)
        )
        limits = EngineLimits(1 << 20, self.plan.token_capacity, config.vocab_size, 64, (EOS,))
        return ReplicaSpec(
            self.plan.groups, self.plan.layout, self.plan.pool_blocks, policy, limits, shape.max_running,
            shape.max_step_tokens, shape.prefix_caching, self._tiers,
        )  # fmt: skip

    def _engine(self, spec: ReplicaSpec) -> Engine:
        def make_scheduler() -> Scheduler:
            coordinator = Coordinator(spec.groups, spec.pool_blocks, spec.policy)
            tiering = Tiering(coordinator, self._mover.tiers if self._mover else {}, self._mover, self.clock)
            limits = SchedulerLimits(spec.max_running, spec.max_step_tokens)
            return Scheduler(tiering, limits, lambda sequence: Namespace(sequence.request.cache_salt.encode()))

        engine = Engine(make_scheduler, _Steps(self), spec.limits, clock=self.clock)
        engine.start()
        return engine

    def run(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            self._at(session.start, partial(self._ask, session, 0, session.start))
        self._next()
        while not self._done.wait(0.002):
            if self.engine._stuck and not self.engine._inbox:  # it waits for a copy: let time pass until one is over
                self._pass_time()
        self.engine.close()

    # -- the runner: on the engine thread

    def run_step(self, plan: StepPlan) -> StepResult:
        self.plans.append((self.clock.seconds, plan.description()))
        result = self.inner.run(plan)
        work = StepWork.of(SequenceWork(s.tokens, s.start, s.samples) for s in plan.sequences)
        self.clock.seconds += self.cost.seconds(work)
        if self._mover is not None:
            self.clock.seconds += self._mover.take_stall()
        self._hand_over()
        return result

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (seconds, self._serial, action))

    def _hand_over(self) -> None:
        while self._next_seconds() <= self.clock.seconds:
            self._take_one()

    def _next_seconds(self) -> float:
        asked = self._events[0][0] if self._events else math.inf
        copied = self._agenda.next_seconds
        return asked if copied is None else min(asked, copied)

    def _take_one(self) -> None:
        """What is due first: the end of a copy, or something that is asked."""
        copied = self._agenda.take_due(self._next_seconds())
        if copied is not None:
            copied()
        else:
            heapq.heappop(self._events)[2]()

    def _pass_time(self) -> None:
        self.clock.seconds = max(self.clock.seconds, self._next_seconds())
        self._hand_over()

    def _next(self) -> None:
        """Nothing is open: let time pass until something is."""
        while self._events and not self._open:
            self.clock.seconds = max(self.clock.seconds, self._next_seconds())
            self._take_one()
        if not self._open:
            self._done.set()

    def _ask(self, session: Session, number: int, seconds: float) -> None:
        turn = session.turns[number]
        name = session.name if len(session.turns) == 1 else f"{session.name}/{number}"
        sampling = SamplingParams(temperature=0.0, max_tokens=turn.output_tokens, ignore_eos=True)
        rules = Forced(tokens_of(((turn.output, turn.output_tokens),)))
        request = GenerateRequest(
            name, tokens_of(turn.pieces), sampling, cache_salt=session.tenant, cache_hints=turn.hints, rules=rules,
            priority=turn.priority,
        )  # fmt: skip
        self._open += 1
        if turn.cancel_after is not None:
            self._at(seconds + turn.cancel_after, lambda: self.engine.cancel(name))
        self.engine.submit(request, lambda event: self._hear(session, number, event))

    def _hear(self, session: Session, number: int, event: Event) -> None:
        if not isinstance(event, TokenEvent) or event.finish is None:
            return
        self._open -= 1
        usage = event.usage
        self.ends[event.request_id] = (
            self.clock.seconds, event.finish.value, usage.cache.device_tokens, usage.cache.host_tokens,
            usage.output_tokens,
        )  # fmt: skip
        if event.finish.value == "length" and number + 1 < len(session.turns):
            seconds = self.clock.seconds + session.turns[number + 1].pause
            self._at(seconds, partial(self._ask, session, number + 1, seconds))
        self._hand_over()
        if not self._open:
            self._next()
