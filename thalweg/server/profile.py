"""What the engine did between /start_profile and /stop_profile, by its own counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thalweg.engine.status import EngineStatus
from thalweg.errors import RequestError


class Profile:
    """One at a time; starting again begins anew. `status` gives the engine's newest snapshot."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status
        self._begin: EngineStatus | None = None

    def start(self) -> dict[str, str]:
        self._begin = self._status()
        return {"status": "profiling"}

    def stop(self) -> dict[str, Any]:
        """Seconds by the engine's clock, and by how much each counter changed. Raises RequestError without a start."""
        begin, end = self._begin, self._status()
        if begin is None:
            raise RequestError("no profile was started")
        self._begin = None
        changed = {name: value - begin.counters.get(name, 0) for name, value in end.counters.items()}
        return {"seconds": end.seconds - begin.seconds, "counters": changed}
