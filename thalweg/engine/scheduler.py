"""Which tokens of which requests the next step computes. The whole policy is in `plan`. No torch, no clock, no I/O.

Running decodes come first, one token each. What is left of the step's token budget goes to prompts, the one with the
least uncached work first, but at least a quarter of it to the oldest prompt, so that a long one always advances.
Waiting requests start in order of arrival when a slot is free and the pools can promise room for all their tokens.
Before that, rows that only a lower tier has are loaded, while the others run.
When a running request needs a block and none can be freed, the last one admitted gives way and waits again at the head
of the queue. It takes its blocks to host memory if there is room, else it computes again what the prefix index loses;
either way its output does not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from thalweg.cache.prefix_index import Namespace
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.engine.request import Running, Sequence
from thalweg.engine.tiering import Loading, Tiering


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step."""

    max_running: int
    max_step_tokens: int


class Scheduler:
    """Waiting and running requests over one cache coordinator. The engine thread owns it."""

    def __init__(self, tiering: Tiering, limits: SchedulerLimits, namespace: Callable[[Sequence], Namespace]) -> None:
        self.tiering = tiering
        self.coordinator = tiering.coordinator
        self.limits = limits
        self._namespace = namespace
        self.waiting: deque[Sequence] = deque()
        self.running: list[Running] = []  # in order of admission
        self.loading: list[Loading] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> StepPlan:
        """The next step, with its blocks reserved; empty if nothing can run."""
        self._admit()
        budget = self.limits.max_step_tokens
        planned: dict[int, SequencePlan] = {}
        decoding = [r for r in self.running if r.remaining_tokens == 1]
        prompts = [r for r in self.running if r.remaining_tokens > 1]
        shares = [(r, 1) for r in decoding[:budget]]
        left = budget - len(shares)
        if prompts:
            oldest = prompts[0]
            reserved = min(oldest.remaining_tokens, -(-left // 4))
            for running in sorted(prompts, key=lambda r: r.remaining_tokens):
                share = min(running.remaining_tokens, left if running is oldest else left - reserved)
                left -= share
                reserved -= min(reserved, share) if running is oldest else 0
                shares.append((running, share))
        for running, tokens in shares:
            if tokens > 0:
                self._reserve(running, tokens, planned)
        return StepPlan(tuple(planned.values()))

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.loading) < self.limits.max_running:
            sequence = self.waiting[0]
            begun = self._begin_loading(sequence) if sequence.swapped is None else self._bring_back(sequence)
            if not begun and not self.tiering.free_blocks():
                return

    def _bring_back(self, sequence: Sequence) -> bool:
        begun = self.tiering.bring_back(sequence, self._namespace(sequence), self._loaded)
        if begun is not None:
            self.waiting.popleft()
            self.loading.append(begun)
        return begun is not None

    def _begin_loading(self, sequence: Sequence) -> bool:
        """Take the head of the queue in: to load what lower tiers have of it, or to run. False if there is no room."""
        namespace = self._namespace(sequence)
        begun = None if sequence.cold else self.tiering.begin(sequence, namespace, self._loaded)
        if begun is not None:
            self.waiting.popleft()
            self.loading.append(begun)
            return True
        hints = sequence.request.cache_hints
        cache = self.coordinator.attach(sequence.tokens, namespace, hints, reuse=not sequence.cold)
        if cache is None:
            return False
        self.waiting.popleft()
        if sequence.load is not None:
            cache.stored_units = sequence.load.stored_units
        if not sequence.preemptions:
            sequence.cache_report = self.tiering.report(sequence, cache.report)
        self.running.append(Running(sequence, cache))
        return True

    def _loaded(self, loading: Loading) -> None:
        """A load is over: run with the blocks that came back, or be admitted next on the rows that are here now."""
        self.loading.remove(loading)
        if loading.cancelled:
            if loading.comes_back:
                self.coordinator.release(loading.cache, keep_state=True)
        elif loading.comes_back:
            self.running.append(Running(loading.sequence, loading.cache))
        else:
            self.waiting.appendleft(loading.sequence)

    def _reserve(self, running: Running, tokens: int, planned: dict[int, SequencePlan]) -> None:
        """Reserve blocks for a share of the step, preempting later requests if that is what it takes."""
        if running not in self.running:
            return  # preempted for the sake of an earlier one
        start = running.cache.computed_tokens
        while not self.coordinator.reserve(running.cache, start + tokens):
            if self.tiering.free_blocks():
                continue
            victim = self.running[-1]
            planned.pop(id(victim), None)
            self._preempt(victim)
            if victim is running:
                return
        samples = start + tokens == len(running.sequence)
        planned[id(running)] = SequencePlan(running, start, start + tokens, samples)

    def _preempt(self, victim: Running) -> None:
        self.preemptions += 1
        victim.sequence.preemptions += 1
        victim.sequence.load = None  # lower tiers may have what the index loses
        self.tiering.take_out(victim)
        self.finish(victim, keep_state=True)
        self.waiting.appendleft(victim.sequence)

    def commit(self, plan: StepPlan) -> None:
        """The step was computed: its tokens are in the cache."""
        for item in plan.sequences:
            self.coordinator.commit(item.running.cache, item.running.sequence.tokens, item.end)
            self.tiering.offer(item.running.cache)
        self.tiering.pump()

    def finish(self, running: Running, *, keep_state: bool) -> None:
        """Take a request out and free its blocks; with `keep_state` its last boundary stays resumable."""
        self.running.remove(running)
        node = running.cache.node
        self.coordinator.release(running.cache, keep_state=keep_state)
        self.tiering.offer_end(node)
        self.tiering.pump()

    def find_waiting(self, request_id: str) -> Sequence | None:
        return next((s for s in self.waiting if s.request_id == request_id), None)

    def find_loading(self, request_id: str) -> Loading | None:
        return next((x for x in self.loading if x.sequence.request_id == request_id and not x.cancelled), None)

    def find_running(self, request_id: str) -> Running | None:
        return next((r for r in self.running if r.sequence.request_id == request_id), None)
