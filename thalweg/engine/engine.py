"""The engine: one thread that plans, runs and commits steps, and tells every request what became of it.

Requests come in through `submit` and `cancel` from any thread; events go out through each request's listener, on the
engine thread. Every submitted request gets exactly one terminal event, errors included.

A failure stays as small as its cause. What is wrong with one request (its rules, its sampling, its listener) ends that
request; a step that fails ends the requests in it. Anything else leaves scheduler, block tables and prefix index in
doubt: every open request ends with UnavailableError and the engine goes on with new ones, over the same model, memory
and disk records.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

from thalweg.engine.limits import EngineLimits
from thalweg.engine.plan import SequencePlan, StepPlan, StepResult
from thalweg.engine.request import Listener, Running, Sequence
from thalweg.engine.runner import Runner
from thalweg.engine.scheduler import Scheduler
from thalweg.engine.shadow import Shadow
from thalweg.engine.status import EngineStatus, status_of, tier_gauges
from thalweg.engine.watchdog import Watchdog
from thalweg.errors import (
    CancelledError,
    ContextLengthError,
    EngineError,
    OverloadedError,
    RequestError,
    ThalwegError,
    UnavailableError,
)
from thalweg.metrics.prometheus import TierGauges
from thalweg.types import (
    Event,
    FinishReason,
    GenerateRequest,
    PrefillProgress,
    Queued,
    SampledToken,
    TokenEvent,
)

_log = logging.getLogger("thalweg.engine")
# A rare fault, or one bad request sent again at once, is over after two restarts. A third crash within a minute means
# that most requests meet it: then whoever balances the load should look elsewhere.
MOST_CRASHES, CRASH_SECONDS = 3, 60.0
_STATUS_SECONDS = 0.02  # between two snapshots while requests run: one takes as long as a layer of a small model


class Engine:
    """See the module. `make_scheduler` gives one with pools and a prefix index of its own, at the start and after each
    crash. `clock` returns seconds and is only used for counters, arrival times and how often the engine crashed."""

    def __init__(
        self,
        make_scheduler: Callable[[], Scheduler],
        runner: Runner,
        limits: EngineLimits,
        *,
        shadow: Shadow | None = None,
        clock: Callable[[], float] = time.monotonic,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.limits = limits
        self._shadow = shadow or Shadow(0.0, lambda: 1.0)
        self._shadow_run: Sequence | None = None
        self._make_scheduler = make_scheduler
        self._runner = runner
        self._clock = clock
        self._watchdog = watchdog or Watchdog()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._open: dict[str, Sequence] = {}  # guarded by _wake
        self._closing = False
        self._draining = False
        self._stuck = False  # nothing can be planned before a copy is over
        self._failure: str | None = None  # why nothing is served now
        self._crashes: deque[float] = deque(maxlen=MOST_CRASHES)
        self._scheduler = self._new_scheduler()
        self._thread = threading.Thread(target=self._loop, name="thalweg-engine", daemon=True)
        self._counters: defaultdict[str, float] = defaultdict(float, restarts=0, failed_steps=0)
        self._status = self._snapshot()

    # -- any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self, seconds: float) -> None:
        """Take nobody in any more, let open requests end for so long, then close."""
        with self._wake:
            self._draining = True
            self._wake.wait_for(lambda: self._closing or not self._open, timeout=seconds)
        self.close()

    def close(self) -> None:
        """Stop the thread after the step under way; every open request ends with UnavailableError. What is on its way
        to a lower tier still gets there."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._watchdog.stop()
        self._scheduler.tiering.close()

    def stalled_seconds(self) -> float:
        """How long the step under way has taken, if that is longer than any should; else 0. By any thread."""
        return self._watchdog.stalled_seconds()

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Queue a request. Raises RequestError, ContextLengthError, OverloadedError or UnavailableError at once."""
        limit = self.limits.output_limit(request)
        own = request.sampling.seed
        seed = secrets.randbits(64) if own is None else own % 2**64
        sequence = Sequence(request, listener, limit, self._clock(), seed=seed)
        with self._wake:
            self._check_serving()
            if self._draining:
                raise UnavailableError("the server is stopping: what runs is finished, nothing new is taken in")
            if request.request_id in self._open:
                raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
            if len(self._open) >= self.limits.max_waiting:
                raise OverloadedError(f"{len(self._open)} requests are open; max_waiting is {self.limits.max_waiting}")
            self._open[request.request_id] = sequence
            self._inbox.append(lambda: self._take(sequence))
            self._wake.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request before its next step; unknown or finished ids are ignored."""
        with self._wake:
            if request_id in self._open:
                self._inbox.append(lambda: self._cancel(request_id))
                self._wake.notify_all()

    def reset_prefix_cache(self, tiers: frozenset[str] | None = None) -> int:
        """Forget what is cached in these tiers (`device`, `host`, `disk`; all if None), between two steps.

        Returns the tokens that the device forgot. Raises UnavailableError if the engine is not running.
        """
        forgotten: Future[int] = Future()

        def reset() -> None:
            try:
                forgotten.set_result(self._scheduler.tiering.reset(tiers))
            except BaseException:
                forgotten.set_exception(UnavailableError("the engine crashed while it forgot what is cached"))
                raise

        with self._wake:
            self._check_serving()
            self._inbox.append(reset)
            self._wake.notify_all()
        while self._thread.is_alive():
            with suppress(TimeoutError):
                return forgotten.result(timeout=1)
        if not forgotten.done():
            raise UnavailableError("the engine stopped before it came to that")
        return forgotten.result()

    def _check_serving(self) -> None:
        """Raises UnavailableError unless the engine takes in what is asked of it. To be called under the lock."""
        if self._closing or self._failure is not None or not self._thread.is_alive():
            raise UnavailableError(self._failure or "the engine is not running")

    def tiers(self) -> tuple[TierGauges, ...]:
        """What the tiers below the device hold and did, by any thread."""
        return tuple(tier_gauges(name, usage) for name, usage in self._scheduler.tiering.usages().items())

    def _post(self, action: Callable[[], None]) -> None:
        """Run an action on the engine thread, between two steps."""
        with self._wake:
            self._inbox.append(action)
            self._wake.notify_all()

    def status(self) -> EngineStatus:
        return self._status

    # -- the engine thread ------------------------------------------------------------------------------------

    def _loop(self) -> None:
        """Serve until somebody closes the engine, over any number of crashes. Even SystemExit counts as one: a thread
        that ends in silence would leave everybody waiting."""
        while True:
            try:
                self._serve()
                return
            except BaseException as error:
                if not self._recover(error):
                    return

    def _serve(self) -> None:
        while self._take_inbox():
            self._step()
            if not self._scheduler.running or self._clock() - self._status.seconds >= _STATUS_SECONDS:
                self._status = self._snapshot()
        self._end_all(UnavailableError("the engine was stopped"))
        self._status = self._snapshot()

    def _recover(self, error: BaseException) -> bool:
        """Go on after a crash with a new scheduler; False if that is of no use."""
        self._crashes.append(self._clock())
        often = len(self._crashes) == MOST_CRASHES and self._crashes[-1] - self._crashes[0] < CRASH_SECONDS
        if self._closing or often:
            self._give_up(error)
            return False
        _log.error("the engine crashed and restarts: %r", error, exc_info=error)
        self._fail_open("the engine crashed and restarts; send the request again")
        try:
            self._scheduler.tiering.abandon()
            self._scheduler = self._new_scheduler()
            self._counters["restarts"] += 1
            status = self._snapshot()
        except BaseException as second:
            self._give_up(second)
            return False
        self._failure = None
        self._status = status  # not before requests are taken in again
        return True

    def _give_up(self, error: BaseException) -> None:
        _log.critical("the engine crashed and stays down: %r", error, exc_info=error)
        self._closing = True
        self._fail_open(f"the engine stopped working: {error!r}")

    def _fail_open(self, why: str) -> None:
        """End every open request, and take nobody in, without a look at state that is in doubt."""
        with self._wake:
            self._failure = why
            left = tuple(self._open.values())
            self._open.clear()
            self._wake.notify_all()
        self._shadow.drop_all()
        self._shadow_run = None
        self._stuck = False
        self._status = replace(self._status, healthy=False, failure=why, running=0, waiting=0, loading=0, timelines={})
        self._counters[f"finished_{FinishReason.ERROR.value}"] += len(left)
        for sequence in left:
            terminal = UnavailableError(why)
            self._send(sequence, TokenEvent(sequence.request_id, (), sequence.usage(), FinishReason.ERROR, terminal))

    def _new_scheduler(self) -> Scheduler:
        """A scheduler whose finished copies report here for as long as it is the engine's."""
        scheduler = self._make_scheduler()

        def report(action: Callable[[], None]) -> None:
            self._post(lambda: action() if scheduler is self._scheduler else None)

        scheduler.tiering.connect(report)
        return scheduler

    def _take_inbox(self) -> bool:
        """Apply what other threads asked for; sleeps while there is nothing to do. False when closing."""
        with self._wake:
            while not (self._inbox or self._closing or self._has_work()):
                self._wake.wait()
            actions, closing = len(self._inbox), self._closing
        for _ in range(actions):
            self._stuck = False
            self._inbox.popleft()()
        return not closing

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        if scheduler.running or scheduler.waiting:
            return not self._stuck
        return self._shadow.waiting and not scheduler.loading

    def _take(self, sequence: Sequence) -> None:
        """Queue a request, unless a crash ended it first. A shadow run under way gives way to it."""
        if self._open.get(sequence.request_id) is not sequence:
            return
        shadow, self._shadow_run = self._shadow_run, None
        if shadow is not None:
            running = self._scheduler.find_running(shadow.request_id)
            if running is not None:
                self._scheduler.finish(running, keep_state=False)
            else:
                self._scheduler.waiting.remove(shadow)
            self._shadow.gave_way()
        self._scheduler.add(sequence)
        expected, limit = self._scheduler.expected_seconds(sequence), self.limits.max_queue_seconds
        if limit is not None and expected is not None and expected > limit:
            self._scheduler.waiting.remove(sequence)
            error = OverloadedError(
                f"the first token is expected after {expected:.1f} s; max_queue_seconds is {limit:g}",
                retry_after_seconds=expected - limit,
            )
            self._finish_event(sequence, FinishReason.ERROR, (), error)
        elif sequence.request.announce:
            self._send(sequence, Queued(sequence.request_id, expected))

    def _step(self) -> None:
        scheduler, begin = self._scheduler, self._clock()  # decodes wait for the planning of a step as well
        if not (scheduler.running or scheduler.waiting or scheduler.loading) and self._shadow.waiting:
            self._shadow_run = self._shadow.start(self._clock(), scheduler.coordinator.fits_free)
            if self._shadow_run is not None:
                scheduler.add(self._shadow_run)
        plan = scheduler.plan()
        self._note_starts()
        if not plan.sequences:
            if scheduler.tiering.busy:
                self._stuck = True
            elif scheduler.waiting and not scheduler.running:
                self._refuse_head()
            return
        self._watchdog.begin(plan)
        try:
            result = self._runner.run(plan)
        except Exception as error:
            _log.exception("a step failed")
            self._counters["failed_steps"] += 1
            for item in plan.sequences:
                self._end(item.running, FinishReason.ERROR, (), EngineError(f"the step failed: {error}"))
            return
        finally:
            self._watchdog.end()
        self._scheduler.commit(plan)
        self._counters["steps"] += 1
        self._counters["step_tokens"] += plan.tokens
        self._counters["decode_tokens"] += plan.decode_tokens
        seconds = self._clock() - begin
        self._scheduler.observe(plan, seconds)
        self._counters["step_seconds"] += seconds
        self._tell(plan, result)

    def _note_starts(self) -> None:
        """Write down when requests began to load and to run."""
        for loading in self._scheduler.loading:
            timeline = loading.sequence.timeline
            if timeline.loading is None and timeline.started is None:
                loading.sequence.timeline = replace(timeline, loading=self._clock())
        for running in self._scheduler.running:
            if running.sequence.timeline.started is None:
                running.sequence.timeline = replace(running.sequence.timeline, started=self._clock())

    def _refuse_head(self) -> None:
        """The pools are empty and the first waiting request still does not fit: it never will."""
        sequence = self._scheduler.waiting.popleft()
        error = ContextLengthError(
            f"{len(sequence)} tokens do not fit the {self.limits.token_capacity} tokens of the cache", param="prompt"
        )
        self._finish_event(sequence, FinishReason.ERROR, (), error)

    def _tell(self, plan: StepPlan, result: StepResult) -> None:
        for item in plan.sequences:
            sequence = item.running.sequence
            if not item.samples:
                self._send(sequence, PrefillProgress(item.request_id, item.end, len(sequence)))
                continue
            try:
                sampled, finish = self._outcome(item, result)
            except ThalwegError as error:
                self._end(item.running, FinishReason.ERROR, (), error)
                continue
            if finish is None:
                self._send(sequence, TokenEvent(item.request_id, (sampled,), sequence.usage()))
            else:
                self._end(item.running, finish, (sampled,), None)

    def _outcome(self, item: SequencePlan, result: StepResult) -> tuple[SampledToken, FinishReason | None]:
        """The token that a step gave to a request, appended to it. Raises what is wrong with this request alone."""
        sequence = item.running.sequence
        if item.request_id in result.failed:
            raise result.failed[item.request_id]
        sampled = result.sampled.get(item.request_id)
        if sampled is None or not 0 <= sampled.token < self.limits.vocab_size:
            raise EngineError("the step gave no token of this model")
        try:
            sequence.append(sampled.token)
            return sampled, sequence.finish_after(sampled, self.limits.eos_token_ids)
        except Exception as error:
            _log.exception("the rules of request %s failed", item.request_id)
            raise EngineError(f"the rules of the output failed: {error}") from error

    def _cancel(self, request_id: str) -> None:
        error = CancelledError("the request was cancelled")
        waiting = self._scheduler.find_waiting(request_id)
        running = self._scheduler.find_running(request_id)
        loading = self._scheduler.find_loading(request_id)
        if waiting is not None:
            self._scheduler.waiting.remove(waiting)
            self._finish_event(waiting, FinishReason.CANCELLED, (), error)
        elif running is not None:
            self._end(running, FinishReason.CANCELLED, (), error)
        elif loading is not None:
            loading.cancelled = True
            self._finish_event(loading.sequence, FinishReason.CANCELLED, (), error)

    def _end(
        self, running: Running, finish: FinishReason, tokens: tuple[SampledToken, ...], error: ThalwegError | None
    ) -> None:
        self._scheduler.finish(running, keep_state=finish is not FinishReason.ERROR)
        self._finish_event(running.sequence, finish, tokens, error)

    def _end_all(self, error: ThalwegError) -> None:
        for running in tuple(self._scheduler.running):
            self._end(running, FinishReason.ERROR, (), error)
        while self._scheduler.waiting:
            self._finish_event(self._scheduler.waiting.popleft(), FinishReason.ERROR, (), error)
        for loading in self._scheduler.loading:
            if not loading.cancelled:
                loading.cancelled = True
                self._finish_event(loading.sequence, FinishReason.ERROR, (), error)

    def _finish_event(
        self, sequence: Sequence, finish: FinishReason, tokens: tuple[SampledToken, ...], error: ThalwegError | None
    ) -> None:
        self._scheduler.tiering.forget(sequence)
        if sequence is self._shadow_run:
            self._shadow_run = None
            if finish is not FinishReason.ERROR:
                self._shadow.finished(sequence)
        else:
            self._shadow.consider(sequence, finish)
            self._counters[f"finished_{finish.value}"] += 1
        self._status = self._snapshot()
        with self._wake:  # not before: until it is told of its end, a crash still has to tell it
            self._open.pop(sequence.request_id, None)
            self._wake.notify_all()
        self._send(sequence, TokenEvent(sequence.request_id, tokens, sequence.usage(), finish, error))

    def _send(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listener(event)
        except BaseException:  # a listener's own fault must not take the others down
            _log.exception("the listener of request %s failed", sequence.request_id)
            self.cancel(sequence.request_id)

    def _snapshot(self) -> EngineStatus:
        counters = {**self._counters, **self._shadow.counters}
        return status_of(self._scheduler, counters, self._clock(), healthy=not self._closing)
