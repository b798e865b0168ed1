"""What a decode step costs beside the model: `python -m benchmarks.overhead OUT.jsonl [--runs N]`.

The same engine decodes with the embedded model and with an empty one, whose forward pass returns logits that were made
before: what is left is planning, building the batch, sampling, committing and telling. Runs alternate.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.commit import commit_name
from thalweg.cli.demo import machine_facts
from thalweg.config.options import load_options
from thalweg.engine.engine import Engine
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.types import GenerateRequest, SamplingParams, TokenEvent

PROMPT_TOKENS, OUTPUT_TOKENS = 2048, 400


class EmptyModel:
    """Logits of as many rows as are wanted, made once."""

    def __init__(self, vocabulary: int) -> None:
        self._logits = torch.randn((64, vocabulary), generator=torch.Generator().manual_seed(0))

    def forward(self, step: Any) -> Tensor:
        return self._logits[: len(step.output_rows)]


def seconds_per_step(engine: Engine, name: str, prompt: np.ndarray) -> float:
    """Median time between two tokens of one request, listening included."""
    marks: list[float] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        if isinstance(event, TokenEvent):
            marks.append(time.perf_counter())
            if event.finish is not None:
                done.set()

    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS)
    engine.submit(GenerateRequest(name, prompt, sampling), listen)
    done.wait()
    return float(median(np.diff(marks[20:])))


def started(threads: int, *, empty: bool) -> Runtime:
    runtime = build_runtime(load_options({"threads": threads}, environment={}))
    if empty:
        runtime.engine._runner.steps = EmptyModel(runtime.model_config.vocab_size)  # type: ignore[attr-defined]
    runtime.engine.start()
    return runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    prompt = np.random.default_rng(1).integers(100, 1900, PROMPT_TOKENS).astype(np.int32)
    real, empty = started(options.threads, empty=False), started(options.threads, empty=True)
    pairs = []
    for number in range(options.runs):
        pairs.append([seconds_per_step(each.engine, f"run {number}", prompt) for each in (real, empty)])
    real.engine.close()
    empty.engine.close()
    whole, overhead = (median(column) for column in zip(*pairs, strict=True))
    facts = {
        "commit": commit_name(),
        "threads": options.threads,
        "step_seconds": whole,
        "empty_step_seconds": overhead,
        "share": median(e / r for r, e in pairs),
        "pairs": pairs,
    }
    with options.out.open("a") as file:
        file.write(json.dumps(facts | machine_facts()) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
