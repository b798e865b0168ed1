"""The engine: one thread that plans, runs and commits steps, and tells every request what became of it.

Requests come in through `submit` and `cancel` from any thread; events go out through each request's listener, on the
engine thread. Every submitted request gets exactly one terminal event, errors included.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from thalweg.cache.pool import GroupUsage
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.request import Listener, Running, Sequence
from thalweg.engine.runner import Runner
from thalweg.engine.scheduler import Scheduler
from thalweg.engine.shadow import Shadow
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
from thalweg.memory.tier import TierUsage
from thalweg.metrics.prometheus import TierGauges
from thalweg.types import (
    Event,
    FinishReason,
    GenerateRequest,
    PrefillProgress,
    Queued,
    SampledToken,
    Timeline,
    TokenEvent,
)

_log = logging.getLogger("thalweg.engine")
_STATUS_SECONDS = 0.02  # between two snapshots while requests run: one takes as long as a layer of a small model


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a request may ask for. Lengths in tokens."""

    max_model_len: int
    token_capacity: int
    vocab_size: int
    max_waiting: int
    eos_token_ids: tuple[int, ...]
    max_queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot, taken between two steps, when the engine's clock showed `seconds`.

    `waiting` has those that wait for room, `loading` those whose rows are on their way. `timelines` has the running and
    loading requests by id.
    """

    seconds: float
    running: int
    waiting: int
    groups: tuple[GroupUsage, ...]
    counters: Mapping[str, float]
    healthy: bool
    failure: str | None
    loading: int = 0
    timelines: Mapping[str, Timeline] = field(default_factory=dict)


class Engine:
    """See the module. `clock` returns seconds and is only used for counters and arrival times."""

    def __init__(
        self,
        scheduler: Scheduler,
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
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._watchdog = watchdog or Watchdog()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._open: dict[str, Sequence] = {}  # guarded by _wake
        self._closing = False
        self._draining = False
        self._stuck = False  # nothing can be planned before a copy is over
        self._failure: str | None = None
        scheduler.tiering.connect(self._post)
        self._thread = threading.Thread(target=self._loop, name="thalweg-engine", daemon=True)
        self._counters: defaultdict[str, float] = defaultdict(float)
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
        self._check_ids(request)
        own = request.sampling.seed
        seed = secrets.randbits(64) if own is None else own % 2**64
        sequence = Sequence(request, listener, self._output_limit(request), self._clock(), seed=seed)
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise UnavailableError("the engine is not running")
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

        Returns the tokens that the device forgot.
        """
        done = threading.Event()
        forgotten: list[int] = []

        def reset() -> None:
            forgotten.append(self._scheduler.tiering.reset(tiers))
            done.set()

        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise UnavailableError("the engine is not running")
            self._inbox.append(reset)
            self._wake.notify_all()
        done.wait()
        return forgotten[0]

    def tiers(self) -> tuple[TierGauges, ...]:
        """What the tiers below the device hold and did, by any thread."""
        return tuple(_gauges(name, tier.usage()) for name, tier in self._scheduler.tiering.tiers.items())

    def _post(self, action: Callable[[], None]) -> None:
        """Run an action on the engine thread, between two steps."""
        with self._wake:
            self._inbox.append(action)
            self._wake.notify_all()

    def status(self) -> EngineStatus:
        return self._status

    def _check_ids(self, request: GenerateRequest) -> None:
        """Raises RequestError for token ids that this model does not have."""
        last, sampling = self.limits.vocab_size - 1, request.sampling
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", [i for i, _ in sampling.logit_bias]),
        ):
            wrong = next((token for token in ids if not 0 <= token <= last), None)
            if wrong is not None:
                raise RequestError(f"{name} has the token id {wrong}; ids go from 0 to {last}", param=name)

    def _output_limit(self, request: GenerateRequest) -> int:
        """How many tokens the request may produce; raises if prompt and output cannot fit."""
        prompt, wanted = len(request.prompt), request.sampling.max_tokens
        limit = min(self.limits.max_model_len, self.limits.token_capacity)
        if prompt == 0:
            raise RequestError("the prompt has no tokens; at least one is needed", param="prompt")
        if int(request.prompt.min()) < 0 or int(request.prompt.max()) >= self.limits.vocab_size:
            last = self.limits.vocab_size - 1
            raise RequestError(f"the prompt has a token id outside 0 to {last}", param="prompt")
        if prompt + (wanted or 1) > limit:
            raise ContextLengthError(
                f"{prompt} prompt tokens + {wanted or 1} output tokens exceed max_model_len, {limit} tokens",
                param="max_tokens" if wanted and prompt + 1 <= limit else "prompt",
            )
        return wanted or limit - prompt

    # -- the engine thread ------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._take_inbox():
                self._guarded_step()
                if not self._scheduler.running or self._clock() - self._status.seconds >= _STATUS_SECONDS:
                    self._status = self._snapshot()
            self._end_all(UnavailableError("the engine was stopped"))
        except Exception as error:
            _log.exception("the engine stopped working")
            self._give_up(error)
        self._status = self._snapshot()

    def _guarded_step(self) -> None:
        """A step whose own bugs end the open requests, not the engine."""
        try:
            self._step()
        except Exception as error:
            _log.exception("the engine could not plan or commit a step")
            self._end_all(EngineError(f"the engine failed: {error}"))

    def _give_up(self, error: Exception) -> None:
        """Not even ending the requests in order worked: tell everybody, take nobody in any more."""
        with self._wake:
            self._closing = True
            self._failure = f"the engine stopped working: {error}"
            left = tuple(self._open.values())
            self._open.clear()
        for sequence in left:
            terminal = EngineError(self._failure)
            self._send(sequence, TokenEvent(sequence.request_id, (), sequence.usage(), FinishReason.ERROR, terminal))

    def _take_inbox(self) -> bool:
        """Apply what other threads asked for; sleeps while there is nothing to do. False when closing."""
        with self._wake:
            while not (self._inbox or self._closing or self._has_work()):
                self._wake.wait()
            actions = list(self._inbox)
            self._inbox.clear()
            closing = self._closing
        for action in actions:
            action()
            self._stuck = False
        return not closing

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        if scheduler.running or scheduler.waiting:
            return not self._stuck
        return self._shadow.waiting and not scheduler.loading

    def _take(self, sequence: Sequence) -> None:
        """Queue a request. A shadow run under way gives way to it."""
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
            if item.request_id in result.failed:
                self._end(item.running, FinishReason.ERROR, (), result.failed[item.request_id])
                continue
            sampled = result.sampled[item.request_id]
            sequence.append(sampled.token)
            finish = sequence.finish_after(sampled, self.limits.eos_token_ids)
            if finish is None:
                self._send(sequence, TokenEvent(item.request_id, (sampled,), sequence.usage()))
            else:
                self._end(item.running, finish, (sampled,), None)

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
            with self._wake:
                self._open.pop(sequence.request_id, None)
                self._wake.notify_all()
            self._counters[f"finished_{finish.value}"] += 1
        self._status = self._snapshot()
        self._send(sequence, TokenEvent(sequence.request_id, tokens, sequence.usage(), finish, error))

    def _send(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:  # a listener's own fault must not take the others down
            _log.exception("the listener of request %s failed", sequence.request_id)

    def _snapshot(self) -> EngineStatus:
        coordinator = self._scheduler.coordinator
        counters = {
            **self._counters,
            **self._scheduler.tiering.counters,
            **self._shadow.counters,
            "preemptions": self._scheduler.preemptions,
            "evicted_units": coordinator.evicted_units,
            "evicted_checkpoints": coordinator.evicted_checkpoints,
            "cached_units": coordinator.index.nodes,
            **{f"evicted_for_{group.value}": count for group, count in coordinator.evicted.items()},
            **{f"checkpoints_{reason.name.lower()}": n for reason, n in coordinator.checkpoints_made.items()},
        }
        loading = [loading.sequence for loading in self._scheduler.loading]
        running = [running.sequence for running in self._scheduler.running]
        return EngineStatus(
            self._clock(),
            len(running),
            len(self._scheduler.waiting),
            coordinator.usage(),
            counters,
            not self._closing,
            self._failure,
            len(loading),
            {sequence.request_id: sequence.timeline for sequence in (*loading, *running)},
        )


def _gauges(name: str, usage: TierUsage) -> TierGauges:
    counts = asdict(usage)
    held = {kind: counts.pop(f"{kind}_bytes") for kind in ("rows", "checkpoint")}
    held["other"] = counts.pop("bytes") - sum(held.values())
    records = counts.pop("rows_records") + counts.pop("checkpoint_records")
    return TierGauges(name, counts.pop("capacity_bytes"), records, held, counts)
