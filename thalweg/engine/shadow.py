"""Shadow runs: a sampled share of the requests that hit is computed again without any cache, while nobody waits.

The same request with the same seed must give the same tokens; every run that does not is counted and logged. This is
"hit = cold" watched where it matters, on real traffic.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from thalweg.engine.request import Sequence
from thalweg.types import Event, FinishReason, GenerateRequest, TokenEvent

_log = logging.getLogger("thalweg.engine")
_MOST_QUEUED = 16
_MOST_ATTEMPTS = 3  # a run that gave way to requests so often is dropped


@dataclass(slots=True)
class _Run:
    request: GenerateRequest
    seed: int
    expected: tuple[int, ...]
    attempts: int = 0


class Shadow:
    """Owned by the engine thread. `random` gives numbers in [0, 1)."""

    def __init__(self, rate: float, random: Callable[[], float]) -> None:
        self.counters: Counter[str] = Counter()
        self._rate = rate
        self._random = random
        self._queue: deque[_Run] = deque()
        self._current: _Run | None = None

    @property
    def waiting(self) -> bool:
        return bool(self._queue)

    def consider(self, sequence: Sequence, finish: FinishReason) -> None:
        """A request ended: maybe it is to be computed again."""
        report = sequence.cache_report
        hit = report.cached_tokens or report.replayed_tokens
        if sequence.cold or not hit or finish not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        if self._random() >= self._rate:
            return
        if len(self._queue) >= _MOST_QUEUED:
            self.counters["shadow_skipped"] += 1
            return
        output = tuple(sequence.tokens[sequence.prompt_tokens :].tolist())
        self._queue.append(_Run(sequence.request, sequence.seed, output))

    def start(self, now: float, fits: Callable[[int], bool]) -> Sequence | None:
        """The next run as a sequence of its own. None, and one run less, if its tokens do not fit: no cached prefix is
        evicted for the sake of a check."""
        run = self._queue.popleft()
        if not fits(len(run.request.prompt) + len(run.expected)):
            self.counters["shadow_skipped"] += 1
            return None
        self._current = run
        run.attempts += 1
        request = replace(run.request, request_id=f"shadow of {run.request.request_id}")
        return Sequence(request, self._told, len(run.expected), now, seed=run.seed, cold=True)

    def gave_way(self) -> None:
        """The run under way was stopped for a request."""
        run, self._current = self._current, None
        if run is not None and run.attempts < _MOST_ATTEMPTS:
            self._queue.appendleft(run)
        else:
            self.counters["shadow_skipped"] += 1

    def drop_all(self) -> None:
        """The engine crashed, maybe of one of these runs."""
        self.counters["shadow_skipped"] += len(self._queue) + (self._current is not None)
        self._queue.clear()
        self._current = None

    def finished(self, sequence: Sequence) -> None:
        """Compare what the run gave with what the request was answered."""
        run, self._current = self._current, None
        assert run is not None, "a shadow run ended that was not under way"
        output = tuple(sequence.tokens[sequence.prompt_tokens :].tolist())
        self.counters["shadow_runs"] += 1
        self.counters["shadow_tokens"] += len(sequence)
        if output != run.expected:
            self.counters["shadow_mismatches"] += 1
            place = next((i for i, pair in enumerate(zip(output, run.expected, strict=False)) if pair[0] != pair[1]), 0)
            _log.error(
                "request %s: its answer from the cache differs from a cold run at output token %d",
                run.request.request_id,
                place,
            )

    def _told(self, event: Event) -> None:
        if isinstance(event, TokenEvent) and event.finish is FinishReason.ERROR:
            self.counters["shadow_failed"] += 1
            self._current = None
