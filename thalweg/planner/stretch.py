"""Many steps of nothing but decodes, without planning each.

Between two boundaries of a unit a decode takes no block from a pool and gives none back (SequenceCache.quiet_until), so
that a step of quiet decodes changes the clock, the scheduler's pace and one count per request. Counts are brought up to
date when somebody looks. A request that is not quiet, or ends, is reserved and committed for itself in the step where
it is due, in the order of a planned step. The outcome is that of planning every step: a test holds the two equal.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from thalweg.engine.request import Running
from thalweg.engine.scheduler import Scheduler
from thalweg.planner.coarse_cost import CoarseCost
from thalweg.planner.cost import StepWork
from thalweg.planner.sim_tiers import Agenda, VirtualClock
from thalweg.planner.tokens import SyntheticTokens


class _Decode:
    """A running request that was last brought up to date before step `synced`."""

    __slots__ = ("last", "running", "synced", "tokens")

    def __init__(self, running: Running, tokens: SyntheticTokens) -> None:
        self.running, self.tokens = running, tokens
        self.synced = 0
        self.last = running.sequence.prompt_tokens + running.sequence.max_output_tokens  # tokens at its end


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
        if not self._goes_on() or not self._begin_due():
            return None
        count = len(self._open)
        return StepWork((), count, count, self._context, self._longest + self._step, count)

    def _goes_on(self) -> bool:
        """Whether a plan would be one of these decodes and nothing else."""
        return bool(self._open) and len(self._scheduler.running) == len(self._open) and not self._admits()

    def _begin_due(self) -> bool:
        """Reserve for those that are due in the next step; False if there is no room for one of them."""
        self._due = []
        while self._wakes and self._wakes[0][0] <= self._step:
            number = heapq.heappop(self._wakes)[1]
            if number in self._open:
                self._due.append(number)
                self._sync(self._decodes[number])
        for number in self._due:
            cache = self._decodes[number].running.cache
            if not self._scheduler.coordinator.reserve(cache, cache.computed_tokens + 1):
                for again in self._due:
                    heapq.heappush(self._wakes, (self._step, again))
                return False
        return True

    def run(
        self, clock: VirtualClock, cost: CoarseCost, limit: float, agenda: Agenda, reserved: Callable[[], None]
    ) -> tuple[list[float], list[Running]]:
        """Steps that begin and end before `limit`, as long as nothing on the agenda is due and nobody is at the last
        token; how long they took, and who is. `reserved` hears of steps that touched pools. Without lower tiers only.
        """
        count, took, ended = len(self._open), list[float](), list[Running]()
        stop = limit if agenda.next_seconds is None else min(limit, agenda.next_seconds)
        while not ended and clock.seconds < stop and self._goes_on():
            price, same = cost.decodes(count, self._context, self._longest + self._step)
            quiet = self._wakes[0][0] - self._step
            if quiet > 0:
                steps = self._run_quiet(clock, price, min(same, quiet), (stop, limit), took)
                if not steps:
                    break
                continue
            end = clock.seconds + price
            if end > limit or not self._begin_due():
                break
            reserved()
            took.append(end - clock.seconds)
            clock.seconds = end
            ended = self._end_step()
        self._scheduler.observe_decodes(count, took)
        return took, ended

    def _run_quiet(
        self, clock: VirtualClock, price: float, most: int, bounds: tuple[float, float], took: list[float]
    ) -> int:
        """At most so many quiet steps of one price that begin before the first bound and end by the second."""
        now, steps, (stop, limit) = clock.seconds, 0, bounds
        while steps < most and now < stop and now + price <= limit:
            end = now + price
            took.append(end - now)
            now = end
            steps += 1
        clock.seconds = now
        self._step += steps
        self._context += steps * len(self._open)
        return steps

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
        self._scheduler.observe_decodes(len(self._open), (seconds,))
        return self._end_step()

    def _end_step(self) -> list[Running]:
        scheduler, tiering = self._scheduler, self._scheduler.tiering
        due = [self._decodes[number] for number in self._due]
        for decode in due:
            cache = decode.running.cache
            scheduler.coordinator.commit(cache, decode.tokens, cache.computed_tokens + 1)
            if tiering.tiers:
                tiering.offer(cache)
        if due or tiering.tiers:
            tiering.pump()
            self._changed = True
        self._step += 1
        self._context += len(self._open)
        ended = []
        for number, decode in zip(self._due, due, strict=True):
            decode.tokens.count += 1
            decode.synced = self._step
            if decode.tokens.count < decode.last:
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
        cache = decode.running.cache
        quiet = cache.quiet_until - cache.computed_tokens
        last = decode.last - decode.tokens.count - 1
        return decode.synced + (min(quiet, last) if quiet > 0 else 0)
