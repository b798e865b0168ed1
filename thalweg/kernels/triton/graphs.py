"""Steps captured as CUDA graphs, and kernels compiled: all that only a GPU can do of both. What is captured, with what
shapes and from what memory, is decided in model/graphs.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.kernels.compilations import Compilations


class CudaGraphs:
    """ops.Capture. All graphs share one pool of memory: a replay overwrites what the one before it left there."""

    def __init__(self, compilations: Compilations) -> None:
        self._compilations = compilations
        self._pool: Any = None

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()  # what is loaded or compiled at its first use cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks of the pools meanwhile: only this thread's calls are part of the graph.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = compute()
        self._compilations.note("a graph of a decode step")

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def watch_compilations(compilations: Compilations) -> None:
    """Have every kernel noted that Triton compiles, or loads from its cache of compiled ones, from now on."""
    from triton import knobs

    def compiled(*, fn: Any, **_: Any) -> None:
        compilations.note(fn.name)

    knobs.runtime.jit_post_compile_hook = compiled
