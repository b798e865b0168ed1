"""What was compiled or captured: before serving it is warm-up, while serving it makes somebody wait."""

from __future__ import annotations

import logging

_log = logging.getLogger("thalweg.kernels")


class Compilations:
    """Counts what is noted once serving has begun, and logs each: after a complete warm-up there is none. By one
    thread; `in_serving` may be read by others."""

    def __init__(self) -> None:
        self.warmed_up = 0
        self.in_serving = 0
        self._serving = False

    def begin_serving(self) -> None:
        self._serving = True

    def note(self, what: str) -> None:
        """A kernel has been compiled, or a graph captured."""
        if not self._serving:
            self.warmed_up += 1
            return
        self.in_serving += 1
        _log.warning("compiled while serving: %s", what)
