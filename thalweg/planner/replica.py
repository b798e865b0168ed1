"""One engine replica on a virtual clock: the real scheduler, cache and tiering with nothing that computes.

What is done between two steps, and in which order, is the engine's (engine/engine.py): take in what was asked, plan,
compute, commit, observe how long it took, tell the requests. A test holds the plans of both equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.cache.policy import CheckpointPolicy
from thalweg.cache.prefix_index import Namespace
from thalweg.engine.limits import EngineLimits
from thalweg.engine.plan import StepPlan
from thalweg.engine.request import Running, Sequence
from thalweg.engine.scheduler import Scheduler, SchedulerLimits
from thalweg.engine.tiering import Tiering
from thalweg.errors import ContextLengthError
from thalweg.memory.layout import CacheLayout
from thalweg.planner.coarse_cost import CoarseCost
from thalweg.planner.cost import SequenceWork, StepWork
from thalweg.planner.outcome import GroupPeak, ReplicaFigures, RequestOutcome
from thalweg.planner.sim_tiers import Agenda, TierSpec, VirtualClock, VirtualMover
from thalweg.planner.speculation import Acceptance, Accepted
from thalweg.planner.stretch import Stretch, can_stretch
from thalweg.planner.tokens import SyntheticKeys, SyntheticTokens, placeholder
from thalweg.planner.trace import Turn
from thalweg.types import GenerateRequest, SamplingParams

_ANY = SamplingParams()


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """How one replica is laid out: what the engine's options come to."""

    groups: tuple[CacheGroupSpec, ...]
    layout: CacheLayout
    pool_blocks: Mapping[Group, int]
    policy: CheckpointPolicy
    limits: EngineLimits
    max_running: int
    max_step_tokens: int
    prefix_caching: bool = True
    tiers: tuple[TierSpec, ...] = ()
    acceptance: Acceptance | None = None  # of speculative drafts; None: there are none


@dataclass(slots=True)
class Asked:
    """A turn on its way to a replica."""

    request_id: str
    tenant: str
    turn: Turn
    tokens: SyntheticTokens
    arrived: float
    first_token: float = math.nan
    sequence: Sequence | None = None
    accepted: Accepted | None = None


Report = Callable[[RequestOutcome], float]  # of a request that ended; returns until when the replica may run on


class Replica:
    """`on_plan` hears of every planned step; steps of a stretch are not planned. `bulk` False plans them all."""

    def __init__(
        self,
        number: int,
        spec: ReplicaSpec,
        cost: CoarseCost,
        report: Report,
        *,
        bulk: bool = True,
        on_plan: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        self.number, self._spec, self._cost, self._report = number, spec, cost, report
        self._bulk, self._on_plan = bulk and spec.acceptance is None, on_plan
        self.clock, self._agenda = VirtualClock(), Agenda()
        self.coordinator = Coordinator(
            spec.groups, spec.pool_blocks, spec.policy, prefix_caching=spec.prefix_caching, keys=SyntheticKeys()
        )
        self._mover = None
        if spec.tiers:
            self._mover = VirtualMover(self.clock, self._agenda, spec.groups, spec.layout, spec.tiers)
        tiering = Tiering(self.coordinator, self._mover.tiers if self._mover else {}, self._mover, self.clock)
        limits = SchedulerLimits(spec.max_running, spec.max_step_tokens)
        self.scheduler = Scheduler(tiering, limits, lambda sequence: namespace_of(sequence.request.tenant))
        self._open: dict[str, Asked] = {}
        self._stretch: Stretch | None = None
        self._plan: StepPlan | None = None
        self._under_way = self._stuck = False
        self._begun = self._step_end = 0.0
        self._limit = math.inf
        self._peaks = dict.fromkeys(self.coordinator.pools, 0)
        self._steps = self._computed_tokens = self._most_waiting = 0
        self._busy_seconds = 0.0
        self.outstanding_tokens = 0  # prompts and outputs of its open requests

    # -- what is asked of it ----------------------------------------------------------------------------------

    @property
    def next_seconds(self) -> float:
        """When something happens here next; inf: never."""
        if self._under_way:
            return self._step_end
        if self._has_work():
            return self.clock.seconds
        following = self._agenda.next_seconds
        return math.inf if following is None else max(following, self.clock.seconds)

    def submit(self, asked: Asked) -> None:
        """Queue a request that arrives at a time to which this replica has run."""
        self.outstanding_tokens += asked.turn.prompt_tokens + asked.turn.output_tokens
        self._agenda.add(asked.arrived, lambda: self._take(asked))

    def cancel(self, request_id: str, seconds: float) -> None:
        """The client goes away; unknown or finished ids are ignored."""
        self._agenda.add(seconds, lambda: self._cancel(request_id))

    def cached_tokens(self, asked: Asked) -> int:
        """Prompt tokens that could be attached here now."""
        match = self.coordinator.probe(asked.tokens, namespace_of(asked.tenant))
        return match.resume * self._spec.policy.unit_tokens

    def run_until(self, limit: float) -> None:
        """Let time pass. A step that begins before `limit` may end after it; then it is still under way."""
        self._limit = limit
        while True:
            if self._under_way:
                if self._step_end > self._limit:
                    return
                self._finish_step()
            while (action := self._agenda.take_due(self.clock.seconds)) is not None:
                self._stuck = False
                action()
            if not self._has_work():
                following = self._agenda.next_seconds
                if following is None or following > self._limit:
                    return
                self.clock.seconds = following
            elif self.clock.seconds >= self._limit:
                return
            elif not self._run_stretch():
                self._begin_step()

    def figures(self) -> ReplicaFigures:
        """What it counted so far."""
        pools = self.coordinator.pools
        return ReplicaFigures(
            self._steps,
            self._busy_seconds,
            self._computed_tokens,
            self.scheduler.preemptions,
            self._most_waiting,
            tuple(GroupPeak(g.value, pools[g].total_blocks, peak) for g, peak in self._peaks.items()),
            {group.value: count for group, count in self.coordinator.evicted.items()},
            {name: asdict(usage) for name, usage in self.scheduler.tiering.usages().items()},
            dict(self.scheduler.tiering.counters),
        )

    # -- between steps ----------------------------------------------------------------------------------------

    def _has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting) and not self._stuck

    def _take(self, asked: Asked) -> None:
        turn, limits = asked.turn, self._spec.limits
        prompt, outputs = turn.prompt_tokens, turn.output_tokens
        request = GenerateRequest(
            asked.request_id, placeholder(prompt), _ANY, asked.tenant, cache_hints=turn.hints, priority=turn.priority
        )
        asked.sequence = sequence = Sequence(request, _nobody, outputs, asked.arrived, known=asked.tokens)
        try:
            limits.output_limit_of(prompt, outputs)
        except ContextLengthError:
            return self._over(asked, "error", "too long for the cache or the model")
        if len(self._open) >= limits.max_waiting:
            return self._over(asked, "error", "max_waiting")
        self._open[asked.request_id] = asked
        if self._spec.acceptance is not None:
            asked.accepted = self._spec.acceptance.of(asked.request_id)
        self.scheduler.add(sequence)
        self._most_waiting = max(self._most_waiting, len(self.scheduler.waiting))
        most = limits.max_queue_seconds
        expected = self.scheduler.expected_seconds(sequence) if most is not None else None
        if most is not None and expected is not None and expected > most:
            self.scheduler.waiting.remove(sequence)
            self._over(asked, "error", "max_queue_seconds")
        return None

    def _cancel(self, request_id: str) -> None:
        asked = self._open.get(request_id)
        if asked is None:
            return
        self._close_stretch()
        waiting, running = self.scheduler.find_waiting(request_id), self.scheduler.find_running(request_id)
        if waiting is not None:
            self.scheduler.waiting.remove(waiting)
        elif running is not None:
            self.scheduler.finish(running, keep_state=True)
        elif (loading := self.scheduler.find_loading(request_id)) is not None:
            loading.cancelled = True
        self._over(asked, "cancelled")

    def _over(self, asked: Asked, finish: str, why: str | None = None) -> None:
        """The end of a request."""
        sequence, turn = asked.sequence, asked.turn
        assert sequence is not None, "ended before it was taken in"
        self.scheduler.tiering.forget(sequence)
        self._open.pop(asked.request_id, None)
        self.outstanding_tokens -= turn.prompt_tokens + turn.output_tokens
        started, report = sequence.timeline.started, sequence.cache_report
        row = RequestOutcome(
            asked.request_id, self.number, asked.arrived, math.nan if started is None else started, asked.first_token,
            self.clock.seconds, sequence.prompt_tokens, sequence.output_tokens, report.device_tokens,
            report.host_tokens, report.disk_tokens, report.replayed_tokens, sequence.preemptions, finish,
            why or report.reason.value,
        )  # fmt: skip
        self._limit = min(self._limit, self._report(row))

    # -- steps ------------------------------------------------------------------------------------------------

    def _run_stretch(self) -> bool:
        """Steps of a stretch, each at once; whether there were any."""
        if self._stretch is None or self._mover is not None:
            return False
        count = len(self.scheduler.running)
        took, ended = self._stretch.run(self.clock, self._cost, self._limit, self._agenda, self._note_peaks)
        self._steps += len(took)
        self._busy_seconds += sum(took)
        self._computed_tokens += len(took) * count
        for running in ended:
            self._end(running)
        return bool(took)

    def _begin_step(self) -> None:
        work = self._stretch.begin() if self._stretch is not None else None
        if work is None:
            self._close_stretch()
            work = self._planned()
            if work is None:
                return
        self._begun = self.clock.seconds
        self._step_end = self._begun + self._cost.seconds(work)
        if self._mover is not None:
            self._step_end += self._mover.take_stall()
        self._under_way = True
        self._computed_tokens += work.tokens
        if self._stretch is None or self._stretch.due:
            self._note_peaks()

    def _planned(self) -> StepWork | None:
        """Plan a step; None if nothing can run."""
        scheduler = self.scheduler
        self._plan = plan = scheduler.plan()
        now = self.clock.seconds
        for running in scheduler.running:
            if running.sequence.timeline.started is None:
                running.sequence.timeline = replace(running.sequence.timeline, started=now)
        if self._on_plan is not None and plan.sequences:
            self._on_plan(plan, now)
        if plan.sequences:
            work = StepWork.of(SequenceWork(s.tokens, s.start, s.samples) for s in plan.sequences)
            return work if self._spec.acceptance is None else self._speculated(plan, work, self._spec.acceptance.drafts)
        if scheduler.tiering.busy:
            self._stuck = True
        elif scheduler.waiting and not scheduler.running:
            head = scheduler.waiting.popleft()
            self._over(self._open[head.request_id], "error", "does not fit the cache")
        return None

    def _speculated(self, plan: StepPlan, work: StepWork, drafts: int) -> StepWork:
        """The same step with drafts behind every decode. What will be accepted of them is drawn now, as far as there is
        room for it."""
        items = []
        for item in plan.sequences:
            sequence, accepted = item.running.sequence, self._open[item.request_id].accepted
            end = item.end
            if sequence.output_tokens and item.samples and item.tokens == 1 and accepted is not None:
                left = sequence.max_output_tokens - sequence.output_tokens
                end = item.start + min(left, accepted.next())
                if end > item.end and not self.coordinator.reserve(item.running.cache, end):
                    end = item.end
            items.append(replace(item, end=end))
        self._plan = StepPlan(tuple(items))
        return replace(work, decode_tokens=work.decode_tokens + drafts * work.decodes)

    def _finish_step(self) -> None:
        self.clock.seconds = self._step_end
        self._under_way = False
        seconds = self._step_end - self._begun
        self._steps += 1
        self._busy_seconds += seconds
        if self._stretch is not None:
            for running in self._stretch.finish(seconds):
                self._end(running)
            return
        plan = self._plan
        assert plan is not None, "a step that nobody planned"
        self.scheduler.commit(plan)
        self.scheduler.observe(plan, seconds)
        for item in plan.sequences:
            if item.samples:
                self._append(item.running, item.end - len(item.running.sequence) + 1)
        if self._bulk and can_stretch(self.scheduler):
            tokens = [self._open[r.sequence.request_id].tokens for r in self.scheduler.running]
            self._stretch = Stretch(self.scheduler, tokens)

    def _append(self, running: Running, tokens: int) -> None:
        sequence = running.sequence
        first = sequence.output_tokens == 0
        for _ in range(tokens):
            sequence.append(0)
        if first:
            self._open[sequence.request_id].first_token = self.clock.seconds
        if sequence.output_tokens >= sequence.max_output_tokens:
            self._end(running)

    def _end(self, running: Running) -> None:
        self.scheduler.finish(running, keep_state=True)
        self._over(self._open[running.sequence.request_id], "length")

    def _close_stretch(self) -> None:
        if self._stretch is not None:
            self._stretch.close()
            self._stretch = None

    def _note_peaks(self) -> None:
        peaks = self._peaks
        for group, pool in self.coordinator.pools.items():
            used = pool.total_blocks - pool.free_blocks - pool.idle_blocks
            if used > peaks[group]:
                peaks[group] = used


@lru_cache(maxsize=4096)
def namespace_of(tenant: str) -> Namespace:
    """Tenants share nothing."""
    own = tenant.encode()
    return Namespace(b"simulated " + own, own, own)


def _nobody(event: object) -> None:
    """Listens to a request of which only the numbers matter."""
