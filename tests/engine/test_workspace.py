"""The workspace law over whole steps: what a step allocates does not depend on how much context lies before it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from benchmarks.workspace import Watched
from thalweg.config.options import load_options
from thalweg.engine.runtime import build_runtime
from thalweg.types import GenerateRequest, SamplingParams, TokenEvent

CHUNK, TOKENS = 256, 32_768


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
    prefill = [step for step in watched.steps if step.end <= TOKENS]
    early = [s for s in prefill if 4096 <= s.end <= 8192]
    late = [s for s in prefill if TOKENS - 8192 <= s.end < TOKENS - 4096]  # steps of the same size: its end goes faster
    assert len(early) > 5 and len(late) > 5 and watched.steps[-1].end > TOKENS
    assert max(s.total_bytes for s in late) <= 1.05 * max(s.total_bytes for s in early)
    assert max(s.largest_bytes for s in late) <= 1.05 * max(s.largest_bytes for s in early)
    assert min(s.total_bytes for s in early) > 1000 * (early[1].end - early[0].end), "something was counted"
