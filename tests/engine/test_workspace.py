"""The workspace law over whole steps: what a step allocates does not depend on how much context lies before it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thalweg.config.options import load_options
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.runner import Runner
from thalweg.engine.runtime import build_runtime
from thalweg.types import GenerateRequest, SamplingParams, TokenEvent

CHUNK, TOKENS = 256, 32_768


class Allocated(TorchDispatchMode):
    """Bytes of all storages that operations made, freed ones included, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                size = x.untyped_storage().nbytes()
                self.total, self.largest = self.total + size, max(self.largest, size)
        return result


class Watched:
    """A runner that notes what each step allocates: (end, total bytes, bytes of the largest)."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.steps: list[tuple[int, int, int]] = []

    def run(self, plan: StepPlan) -> StepResult:
        with Allocated() as allocated:
            result = self._runner.run(plan)
        self.steps.append((plan.sequences[0].end, allocated.total, allocated.largest))
        return result


def test_a_step_allocates_no_more_deep_in_the_context_than_early() -> None:
    options = {"max_num_batched_tokens": CHUNK, "max_model_len": 2 * TOKENS, "threads": torch.get_num_threads()}
    runtime = build_runtime(load_options(options, environment={}))
    watched = Watched(runtime.engine._runner)
    runtime.engine._runner = watched
    runtime.engine.start()
    done = threading.Event()

    def listen(event: Any) -> None:
        if isinstance(event, TokenEvent) and event.finish is not None:
            done.set()

    prompt = np.random.default_rng(3).integers(100, 1900, TOKENS).astype(np.int32)
    runtime.engine.submit(GenerateRequest("long", prompt, SamplingParams(temperature=0, max_tokens=40)), listen)
    done.wait()
    runtime.engine.close()
    ends = [end for end, _, _ in watched.steps]
    prefill = [step for step in watched.steps if step[0] <= TOKENS]
    size = prefill[1][0] - prefill[0][0]
    early = [s for s in prefill if 4096 <= s[0] <= 8192]
    late = [s for s in prefill if TOKENS - 8192 <= s[0] < TOKENS - 4096]  # steps of the same size: its end goes faster
    assert len(early) > 5 and len(late) > 5 and size > 1 and ends[-1] > TOKENS
    for place in (1, 2):
        assert max(s[place] for s in late) <= 1.05 * max(s[place] for s in early)
    assert max(s[1] for s in early) > size * 1000, "something was counted"
