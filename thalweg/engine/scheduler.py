"""Which tokens of which requests the next step computes. The whole policy is in `plan`. No torch, no clock, no I/O.

Running decodes come first, one token each. What is left of the step's token budget, and of what `pace` allows beside
decodes, goes to prompts: the one with the least uncached work first, but at least a quarter to the oldest prompt, so
that a long one always advances. A prompt of much work never fills a step: whoever arrives meanwhile waits for less.
Waiting requests start when a slot is free and the pools can promise room for all their tokens: those that gave way
first, then by priority, then the least uncached work. Work counts for less the more tokens others were given since the
request arrived, so that nobody waits for ever. Before they start, rows that only a lower tier has are loaded, while the
others run.
When a running request needs a block and none can be freed, the last one admitted gives way and waits again at the head
of the queue. It takes its blocks to host memory if there is room, else it computes again what the prefix index loses;
either way its output does not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from thalweg.cache.prefix_index import Namespace
from thalweg.engine.pace import Pace
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.engine.request import Running, Sequence
from thalweg.engine.tiering import Loading, Tiering

LONG_STEPS = 4  # a prompt of more uncached work than so many steps is long
LONG_SHARE = 2  # a long prompt takes at most one part in so many of a step
AGING = 8  # so many tokens given to others make a request's work seem one token less


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
        self._pace = Pace(burst_tokens=LONG_STEPS * limits.max_step_tokens)
        self._given_tokens = 0  # by all steps so far: the clock of aging

    def add(self, sequence: Sequence) -> None:
        if not sequence.cold:
            match = self.coordinator.probe(sequence.tokens, self._namespace(sequence))
            sequence.uncached_tokens = len(sequence) - match.resume * self.coordinator.policy.unit_tokens
        sequence.added_at = self._given_tokens
        self.waiting.append(sequence)

    def plan(self) -> StepPlan:
        """The next step, with its blocks reserved; empty if nothing can run."""
        self.admit()
        planned: dict[int, SequencePlan] = {}
        admitted = len(self.running)
        decoding = [r for r in self.running if r.remaining_tokens == 1]
        prompts = [r for r in self.running if r.remaining_tokens > 1] if len(decoding) < admitted else []
        decoding = decoding[: self.limits.max_step_tokens]
        for running, tokens in [*((r, 1) for r in decoding), *self._prompt_shares(prompts, len(decoding))]:
            gave_way = len(self.running) < admitted and running not in self.running  # for the sake of an earlier one
            if tokens > 0 and not gave_way:
                self._reserve(running, tokens, planned)
        plan = StepPlan(tuple(planned.values()))
        self._given_tokens += plan.tokens
        return plan

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """How long a step took."""
        depth = max((s.end for s in plan.sequences if s.tokens > 1), default=0)
        decodes = plan.decode_tokens
        self._pace.observe(decodes, plan.tokens - decodes, seconds, depth)

    def observe_decodes(self, decodes: int, seconds: SequenceOf[float]) -> None:
        """The same for steps that nobody planned, of one more token for each of so many running requests."""
        self._given_tokens += decodes * len(seconds)
        self._pace.observe_decodes(seconds)

    def expected_seconds(self, sequence: Sequence) -> float | None:
        """How long a queued request will wait for its first token, about; None while no prompt was computed yet.

        Its own uncached work, that of others which go first, the part of the oldest longer one, and what decodes keep.
        That a slot or room must become free first is not in it.
        """
        own = self._pace.prompt_seconds(len(sequence) - sequence.uncached_tokens, len(sequence))
        if own is None:
            return None
        rank, longer = self._rank(sequence, sequence.uncached_tokens), False
        ahead = 0.0
        spans = [(s, len(s) - s.uncached_tokens) for s in self.waiting if s is not sequence]
        spans += [(r.sequence, r.cache.computed_tokens) for r in self.running if r.remaining_tokens > 1]
        for other, start in spans:
            if self._rank(other, len(other) - start) <= rank:
                ahead += self._pace.prompt_seconds(start, len(other)) or 0.0
            else:
                longer = True
        seconds = (own + ahead) / (0.75 if longer else 1.0)
        decodes = any(r.remaining_tokens == 1 for r in self.running)
        return self._pace.beside_decodes(seconds) if decodes else seconds

    def _prompt_shares(self, prompts: SequenceOf[Running], decodes: int) -> list[tuple[Running, int]]:
        if not prompts:
            return []
        left = left_to_long = self.limits.max_step_tokens - decodes
        if decodes:
            allowed, allowed_to_long = self._pace.prompt_tokens(long=False), self._pace.prompt_tokens(long=True)
            left = left if allowed is None else min(left, allowed)
            left_to_long = left if allowed_to_long is None else min(left, allowed_to_long)
        left_to_long = min(left_to_long, max(1, self.limits.max_step_tokens // LONG_SHARE))
        oldest = prompts[0]
        reserved = min(oldest.remaining_tokens, -(-left // 4), left_to_long if self._long(oldest) else left)
        shares = []
        for running in sorted(prompts, key=lambda r: self._rank(r.sequence, r.remaining_tokens)):
            most = left if running is oldest else left - reserved
            if self._long(running):
                most = min(most, left_to_long)
            share = max(0, min(running.remaining_tokens, most))
            left -= share
            left_to_long -= share if self._long(running) else 0
            reserved -= min(reserved, share) if running is oldest else 0
            shares.append((running, share))
        return shares

    def _long(self, running: Running) -> bool:
        return running.remaining_tokens > LONG_STEPS * self.limits.max_step_tokens

    def _rank(self, sequence: Sequence, work: int) -> tuple[int, float]:
        """Lower goes first."""
        return sequence.request.priority, work - (self._given_tokens - sequence.added_at) / AGING

    def admit(self) -> None:
        """Start waiting requests as far as slots and room go. Part of every plan."""
        while self.waiting and len(self.running) + len(self.loading) < self.limits.max_running:
            sequence = self._next_waiting()
            begun = self._begin_loading(sequence) if sequence.swapped is None else self._bring_back(sequence)
            if not begun and not self.tiering.free_blocks():
                return

    def _next_waiting(self) -> Sequence:
        """Who starts next, brought to the head of the queue."""
        head = self.waiting[0]
        if head.preemptions == 0 and head.load is None:
            best = min(self.waiting, key=lambda s: self._rank(s, s.uncached_tokens))
            if best is not head:
                self.waiting.remove(best)
                self.waiting.appendleft(best)
            return best
        return head

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
