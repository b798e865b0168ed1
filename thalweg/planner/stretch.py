"""Many steps of nothing but decodes, without planning each.

Between two boundaries of a unit a decode takes no block from a pool and gives none back (SequenceCache.quiet_until), so
that a step of quiet decodes changes the clock, the scheduler's pace and one count per request. Counts are brought up to
date when somebody looks. A request that is not quiet, or ends, is reserved and committed for itself in the step where
it is due, in the order of a planned step. The outcome is that of planning every step: a test holds the two equal.
"""

from __future__ import annotations

import heapq

from thalweg.engine.request import Running
from thalweg.engine.scheduler import Scheduler
from thalweg.planner.coarse_cost import CoarseCost
from thalweg.planner.cost import StepWork
from thalweg.planner.sim_tiers import Agenda, VirtualClock
from thalweg.planner.tokens import SyntheticTokens


class _Decode:
    """A running request that was last brought up to date before step `synced`."""

    __slots__ = ("running", "synced", "tokens")

    def __init__(self, running: Running, tokens: SyntheticTokens) -> None:
        self.running, self.tokens = running, tokens
        self.synced = 0


def can_stretch(scheduler: Scheduler) -> bool:
    """Whether the next step is one of decodes alone, of all that run."""
    running = scheduler.running
    return 0 < len(running) <= scheduler.limits.max_step_tokens and all(
        r.remaining_tokens == 1 and r.sequence.output_tokens > 0 for r in running
    )


class Stretch:
    """From a step for which `can_stretch` holds to `close`. `begin` and `finish` are called in turns."""

    def __init__(self, scheduler: Scheduler, tokens: list[SyntheticTokens]) -> None:
        self._scheduler = scheduler
        self._decodes = [_Decode(r, t) for r, t in zip(scheduler.running, tokens, strict=True)]
        self._open = set(range(len(self._decodes)))
        self._step = 0
        self._due: list[int] = []
        self._changed = True  # pools or the index, since admission was last tried
        self._wakes = [(self._wake(decode), number) for number, decode in enumerate(self._decodes)]
        heapq.heapify(self._wakes)
        self._context = sum(r.cache.computed_tokens for r in scheduler.running)
        self._longest = max(r.cache.computed_tokens for r in scheduler.running)  # in step 0
        self._waiting_seen = -1  # how many waited when admission was last tried, and would be refused again

    @property
    def due(self) -> bool:
        """Whether the step begun touches pools."""
        return bool(self._due)

    def begin(self) -> StepWork | None:
        """The next step, with its blocks reserved; None where it must be planned."""
        scheduler = self._scheduler
        if not self._open or len(scheduler.running) != len(self._open) or self._admits():
            return None
        self._due = []
        while self._wakes and self._wakes[0][0] <= self._step:
            number = heapq.heappop(self._wakes)[1]
            if number in self._open:
                self._due.append(number)
                self._sync(self._decodes[number])
        for number in self._due:
            cache = self._decodes[number].running.cache
            if not scheduler.coordinator.reserve(cache, cache.computed_tokens + 1):
                return None
        count = len(self._open)
        return StepWork((), count, count, self._context, self._longest + self._step, count)

    def run_quiet(self, clock: VirtualClock, cost: CoarseCost, limit: float, agenda: Agenda) -> list[float]:
        """Quiet steps that begin and end before `limit`, each at once, as long as nothing on the agenda is due; returns
        how long they took."""
        scheduler, count = self._scheduler, len(self._open)
        if not count or len(scheduler.running) != count or self._admits():
            return []
        left = (self._wakes[0][0] if self._wakes else self._step) - self._step
        stop = min(limit, agenda.next_seconds or limit)
        took: list[float] = []
        now = clock.seconds
        while left > 0 and now < stop:
            price, same = cost.decodes(count, self._context, self._longest + self._step)
            steps = 0
            while steps < same and steps < left and now < stop and now + price <= limit:
                end = now + price
                took.append(end - now)
                now = end
                steps += 1
            if not steps:
                break
            left -= steps
            self._step += steps
            self._context += steps * count
        clock.seconds = now
        scheduler.observe_decodes(count, took)
        return took

    def _admits(self) -> bool:
        """Whether a plan would begin with admissions. Refused ones are not tried again before something changes."""
        scheduler = self._scheduler
        waiting = len(scheduler.waiting)
        if not waiting or len(scheduler.running) + len(scheduler.loading) >= scheduler.limits.max_running:
            return False
        if scheduler.tiering.tiers:
            return True  # asking them has effects
        if waiting == self._waiting_seen and not self._changed:
            return False
        self._waiting_seen, self._changed = waiting, False
        scheduler.admit()
        return len(scheduler.waiting) != waiting

    def finish(self, seconds: float) -> list[Running]:
        """The step took so long: requests that are at their last token."""
        scheduler, count = self._scheduler, len(self._open)
        due = [self._decodes[number] for number in self._due]
        for decode in due:
            cache = decode.running.cache
            scheduler.coordinator.commit(cache, decode.running.sequence.tokens, cache.computed_tokens + 1)
            scheduler.tiering.offer(cache)
        if due or scheduler.tiering.tiers:
            scheduler.tiering.pump()
        scheduler.observe_decodes(count, (seconds,))
        self._step += 1
        self._context += count
        self._changed = self._changed or bool(due)
        ended = []
        for number, decode in zip(self._due, due, strict=True):
            decode.tokens.count += 1
            decode.synced = self._step
            sequence = decode.running.sequence
            if sequence.output_tokens < sequence.max_output_tokens:
                heapq.heappush(self._wakes, (self._wake(decode), number))
            else:
                ended.append(decode.running)
                self._leave(number)
        self._due = []
        return ended

    def _leave(self, number: int) -> None:
        gone = self._decodes[number].running.cache.computed_tokens
        self._open.remove(number)
        self._context -= gone
        if gone == self._longest + self._step and self._open:
            left = (self._decodes[n] for n in self._open)
            self._longest = max(d.running.cache.computed_tokens - d.synced for d in left)

    def close(self) -> None:
        """Bring every request up to date."""
        for number in self._open:
            self._sync(self._decodes[number])

    def _sync(self, decode: _Decode) -> None:
        steps = self._step - decode.synced
        if steps:
            cache = decode.running.cache
            cache.advance(cache.computed_tokens + steps)
            decode.tokens.count += steps
            decode.synced = self._step

    def _wake(self, decode: _Decode) -> int:
        """The next step in which a request is not quiet or ends."""
        cache, sequence = decode.running.cache, decode.running.sequence
        quiet = max(0, cache.quiet_until - cache.computed_tokens)
        last = sequence.max_output_tokens - sequence.output_tokens - 1
        return decode.synced + min(quiet, last)
