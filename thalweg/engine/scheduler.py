"""Which tokens of which requests the next step computes. The whole policy is in `plan`. No torch, no clock, no I/O.

Running decodes come first, one token each. What is left of the step's token budget goes to prompts, the one with the
least uncached work first, but at least a quarter of it to the oldest prompt, so that a long one always advances.
Waiting requests start in order of arrival when a slot is free and the pools can promise room for all their tokens.
When a running request needs a block and none can be freed, the last one admitted gives way and waits again at the head
of the queue; its tokens are kept, so its output does not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from thalweg.cache.coordinator import Coordinator
from thalweg.cache.prefix_index import Namespace
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.engine.request import Running, Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step."""

    max_running: int
    max_step_tokens: int


class Scheduler:
    """Waiting and running requests over one cache coordinator. The engine thread owns it."""

    def __init__(
        self, coordinator: Coordinator, limits: SchedulerLimits, namespace: Callable[[Sequence], Namespace]
    ) -> None:
        self.coordinator = coordinator
        self.limits = limits
        self._namespace = namespace
        self.waiting: deque[Sequence] = deque()
        self.running: list[Running] = []  # in order of admission
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
        while self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            hints = sequence.request.cache_hints
            cache = self.coordinator.attach(sequence.tokens, self._namespace(sequence), hints)
            if cache is None:
                return
            self.waiting.popleft()
            if not sequence.preemptions:
                sequence.cache_report = cache.report
            self.running.append(Running(sequence, cache))

    def _reserve(self, running: Running, tokens: int, planned: dict[int, SequencePlan]) -> None:
        """Reserve blocks for a share of the step, preempting later requests if that is what it takes."""
        if running not in self.running:
            return  # preempted for the sake of an earlier one
        start = running.cache.computed_tokens
        while not self.coordinator.reserve(running.cache, start + tokens):
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
        self.finish(victim, keep_state=True)
        self.waiting.appendleft(victim.sequence)

    def commit(self, plan: StepPlan) -> None:
        """The step was computed: its tokens are in the cache."""
        for item in plan.sequences:
            self.coordinator.commit(item.running.cache, item.running.sequence.tokens, item.end)

    def finish(self, running: Running, *, keep_state: bool) -> None:
        """Take a request out and free its blocks; with `keep_state` its last boundary stays resumable."""
        self.running.remove(running)
        self.coordinator.release(running.cache, keep_state=keep_state)

    def find_waiting(self, request_id: str) -> Sequence | None:
        return next((s for s in self.waiting if s.request_id == request_id), None)

    def find_running(self, request_id: str) -> Running | None:
        return next((r for r in self.running if r.sequence.request_id == request_id), None)
