"""The watchdog names the step that hangs, and where."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from thalweg.config.options import load_options
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.runner import Runner
from thalweg.engine.runtime import build_runtime
from thalweg.engine.watchdog import Watchdog
from thalweg.kernels.reference import norm
from thalweg.types import Event, GenerateRequest, SamplingParams, TokenEvent


class Hanging:
    """A runner that stays in a kernel until it is let go: the kernel reads a tensor whose values are slow to come."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.hang = threading.Event()
        self.gate = threading.Event()

    def run(self, plan: StepPlan) -> StepResult:
        if self.hang.is_set():
            gate = self.gate

            class Slow(torch.Tensor):
                def float(self) -> torch.Tensor:
                    gate.wait(60)
                    return torch.ones(3)

            norm.rms_norm(torch.ones(3).as_subclass(Slow), None, 1e-6)
        return self._runner.run(plan)


def test_a_hanging_step_is_named_with_its_kernel_and_serving_goes_on() -> None:
    runtime = build_runtime(load_options({"max_model_len": 4096}, environment={}))
    engine, said = runtime.engine, []
    hanging = Hanging(engine._runner)
    engine._runner, engine._watchdog = hanging, Watchdog(0.2, said.append)
    engine.start()
    done = threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, TokenEvent) and event.finish is not None:
            done.set()

    hanging.hang.set()
    prompt = np.arange(100, 140, dtype=np.int32)
    engine.submit(GenerateRequest("the slow one", prompt, SamplingParams(temperature=0, max_tokens=3)), listen)
    deadline = time.monotonic() + 30
    while len(said) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.stalled_seconds() > 0.2
    hanging.hang.clear()
    hanging.gate.set()
    assert done.wait(30), "the request ends as ever"
    time.sleep(0.5)
    count = len(said)
    time.sleep(0.5)
    engine.close()
    assert 2 <= len(said) == count, "told again when its time has doubled, and no more once it is over"
    assert "in kernel rms_norm" in said[0] and "the slow one [0, 40)" in said[0]
