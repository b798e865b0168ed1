"""Says where a step hangs: which requests it computes, and the kernel that its thread is in.

The engine notes when a step begins and ends, and no more; a thread of the watchdog's own looks at it from outside, so
that a hang in a library is seen as well.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from thalweg.engine.plan import StepPlan
from thalweg.kernels.ops import Repeat

PATIENCE_SECONDS = 60.0  # a large model's longest step on a slow CPU takes tens of seconds
_log = logging.getLogger("thalweg.engine")


class Watchdog:
    """`report` gets one line when a step has taken `patience` seconds, and again each time that has doubled."""

    def __init__(
        self,
        patience: float = PATIENCE_SECONDS,
        report: Callable[[str], None] = _log.error,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = patience
        self._report = report
        self._clock = clock
        self._step: tuple[StepPlan, float, int] | None = None  # the plan, when it began, the thread that computes it
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="thalweg-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, plan: StepPlan) -> None:
        """The calling thread computes this step from now on."""
        self._step = plan, self._clock(), threading.get_ident()

    def end(self) -> None:
        self._step = None

    def stalled_seconds(self) -> float:
        """How long the step under way has taken, once that is more than the patience; else 0."""
        step = self._step
        seconds = 0.0 if step is None else self._clock() - step[1]
        return seconds if seconds > self._patience else 0.0

    def _watch(self) -> None:
        told: tuple[StepPlan, float] | None = None  # the step last reported, and when to report it again
        while not self._stopped.wait(min(1.0, self._patience / 4)):
            step = self._step
            if step is None:
                continue
            plan, begin, thread = step
            seconds = self._clock() - begin
            due = told[1] if told is not None and told[0] is plan else self._patience
            if seconds >= due:
                told = plan, 2 * seconds
                self._report(_report(plan, seconds, sys._current_frames().get(thread)))


def _report(plan: StepPlan, seconds: float, frame: FrameType | None) -> str:
    requests = ", ".join(f"{name} [{start}, {end})" for name, start, end, _ in plan.description())
    stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
    kernel = _kernel(frame)
    place = f"in kernel {kernel}" if kernel else f"in {stack[-1].name}" if stack else "in no thread"
    lines = "".join(traceback.format_list(list(stack)))
    return f"a step has taken {seconds:.0f} s and is {place}; it computes {requests}\n{lines}"


def _kernel(frame: FrameType | None) -> str | None:
    """The outermost function of a kernel in the stack; of a repeated step the kernel that its one call is in."""
    outermost = None
    while frame is not None:
        if "/thalweg/kernels/" in frame.f_code.co_filename.replace("\\", "/"):
            repeat = frame.f_locals.get("self")
            outermost = (repeat.kernel_under_way() if isinstance(repeat, Repeat) else None) or frame.f_code.co_name
        frame = frame.f_back
    return outermost
