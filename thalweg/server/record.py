"""What one request does, as the server hears of it: where it stands, and at its end the FinishedRequest.

It keeps no text and no token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from thalweg.errors import ThalwegError
from thalweg.metrics.finished import FinishedRequest
from thalweg.metrics.prometheus import RequestMetrics
from thalweg.server.access import Caller
from thalweg.types import GenerateRequest, PrefillProgress, Timeline, Usage


class RequestRecord:
    """Owned by the event loop. Ends once, by `ended` or `abandoned`; `on_end` then hears of it.

    `timelines` has the engine's newest word by request id. `clock` is the engine's, in seconds.
    """

    def __init__(
        self,
        request: GenerateRequest,
        caller: Caller,
        metrics: RequestMetrics,
        on_end: Callable[[RequestRecord, FinishedRequest], None],
        timelines: Callable[[], Mapping[str, Timeline]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request_id = request.request_id
        self.caller = caller
        self.prompt_tokens = len(request.prompt)
        self.done_tokens = 0  # of the prompt: cached or computed
        self.output_tokens = 0
        self.usage: Usage | None = None
        self.first_token_seconds: float | None = None
        self.over = False
        self._metrics = metrics
        self._on_end = on_end
        self._timelines = timelines
        self._clock = clock
        self._arrived = self._last = clock()
        self._timeline: Timeline | None = None

    @property
    def seconds(self) -> float:
        """Since its arrival."""
        return self._clock() - self._arrived

    def progressed(self, progress: PrefillProgress) -> None:
        """Its prompt got further."""
        self.done_tokens = progress.done_tokens
        if self._timeline is None:
            self.timeline()

    def produced(self, tokens: int, usage: Usage) -> None:
        """Output came."""
        now = self._clock()
        if not tokens or self.over:
            return
        if self.output_tokens == 0:
            self.first_token_seconds = now - self._arrived
            self.done_tokens = self.prompt_tokens
            self._metrics.first_token(self.first_token_seconds, sources_of(usage), usage.cache.reason.value)
        else:
            self._metrics.next_token((now - self._last) / tokens)
        self._metrics.output(tokens)
        self.usage = usage
        self.output_tokens += tokens
        self._last = now

    def ended(self, reason: str, usage: Usage, error: ThalwegError | None = None) -> None:
        """The engine, or a stop string, ended it."""
        self.usage = usage
        self._end(reason, error.kind if error is not None else None)

    def abandoned(self) -> None:
        """Its client left before its end."""
        self._end("cancelled", None)

    @property
    def queued(self) -> bool:
        """Whether, as far as the engine told, nothing of it has begun, not even loading."""
        known = self.timeline()
        return self.usage is None and (known is None or (known.loading is None and known.started is None))

    def timeline(self) -> Timeline | None:
        """When what happened, as far as the engine told: with each output, and in its snapshots before."""
        told = self.usage.timeline if self.usage is not None else self._timelines().get(self.request_id)
        self._timeline = told or self._timeline
        return self._timeline

    def spans(self) -> tuple[float, float, float]:
        """Seconds until now, or until its first token, of waiting, loading and computing its prompt."""
        known = self.timeline()
        until = self.seconds if self.first_token_seconds is None else self.first_token_seconds
        if known is None:
            return until, 0.0, 0.0
        loading, started = (None if at is None else at - known.arrived for at in (known.loading, known.started))
        taken = next((at for at in (loading, started) if at is not None), until)
        computing = until if started is None else min(started, until)
        queue = min(taken, computing)
        return queue, computing - queue, until - computing

    def _end(self, reason: str, error: str | None) -> None:
        if self.over:
            return
        self.over = True
        queue, load, _ = self.spans()
        usage, looked = self.usage, self.first_token_seconds is not None
        finished = FinishedRequest(
            request_id=self.request_id,
            caller=self.caller.name,
            ended_at=time.time(),
            reason=reason,
            miss_reason=usage.cache.reason.value if usage is not None and looked else None,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            prompt_sources=sources_of(usage) if usage is not None and looked else {},
            preemptions=usage.preemptions if usage is not None else 0,
            queue_seconds=queue,
            load_seconds=load,
            first_token_seconds=self.first_token_seconds,
            seconds=self.seconds,
            error=error,
        )
        self._metrics.finished(finished)
        self._on_end(self, finished)


def sources_of(usage: Usage) -> Mapping[str, int]:
    """Prompt tokens by where they came from; they add up to all of them."""
    return {
        "device": usage.cache.device_tokens,
        "host": usage.cache.host_tokens,
        "disk": usage.cache.disk_tokens,
        "replayed": usage.cache.replayed_tokens,
        "computed": usage.computed_tokens,
    }
