"""How long calls take on a GPU: launched one by one, or as one replayed graph. A host's clock stands in on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Calls = Sequence[Callable[[], Any]]


class Stopwatch(Protocol):
    """Mean seconds of one of the calls, all made once in order."""

    name: str

    def seconds(self, calls: Calls) -> float: ...


class HostClock:
    """For a CPU."""

    name = "host"

    def seconds(self, calls: Calls) -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)


class PlainLaunch:
    """Calls from Python, between two events: what an engine without graphs pays."""

    name = "launch"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, calls: Calls) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)


class GraphReplay:
    """All calls captured as one graph, once for each list of calls, and replayed."""

    name = "graph"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: tuple[Calls, torch.cuda.CUDAGraph] | None = None

    def seconds(self, calls: Calls) -> float:
        graph = self._graph(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    def _graph(self, calls: Calls) -> torch.cuda.CUDAGraph:
        if self._captured is None or self._captured[0] is not calls:
            for call in calls:  # compiled and warm before anything is captured
                call()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            self._captured = (calls, graph)
        return self._captured[1]
