"""Times of our own engine's steps, for the planner's step layer: `python benchmarks/planner_steps.py OUT.csv`.

One engine in this process, one thread. A long random prompt is read by steps of a fixed size; then prefixes of it are
continued from the cache, alone and several at once, also beside a new prompt. Of each step: the work, and CPU seconds
of the engine's thread, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from threading import Event

import numpy as np

from benchmarks.commit import commit_name
from thalweg.cli.demo import machine_facts
from thalweg.config.options import load_options
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.runner import Runner
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.planner.cost import SequenceWork, StepWork
from thalweg.types import GenerateRequest, PrefillProgress, SamplingParams, TokenEvent

COLUMNS = ("chunks", "decodes", "decode_tokens", "decode_context", "longest_context", "sampled", "seconds")
OUTPUT_TOKENS = 33
BATCHES = (1, 2, 4, 8)


class TimedRunner:
    """Notes the work and the time of every step."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.steps: list[tuple[StepWork, float]] = []

    def run(self, plan: StepPlan) -> StepResult:
        work = StepWork.of(SequenceWork(s.tokens, s.start, s.samples) for s in plan.sequences)
        begin = time.thread_time()
        result = self._runner.run(plan)
        self.steps.append((work, time.thread_time() - begin))
        return result


def ask(runtime: Runtime, prompts: dict[str, np.ndarray]) -> None:
    """All prompts at once, until each has its answer."""
    left = {name: Event() for name in prompts}
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS)

    def listener(name: str):
        def hear(event: PrefillProgress | TokenEvent) -> None:
            if isinstance(event, TokenEvent) and event.finish is not None:
                left[name].set()

        return hear

    for name, prompt in prompts.items():
        runtime.engine.submit(GenerateRequest(name, prompt, sampling), listener(name))
    for done in left.values():
        done.wait()


def measure(tokens: int) -> list[tuple[StepWork, float]]:
    """Steps of prompts and decodes up to a context of so many tokens."""
    runtime = build_runtime(load_options({"threads": 1, "kv_cache_memory": "1GiB"}, environment={}))
    timed = TimedRunner(runtime.engine._runner)
    runtime.engine._runner = timed
    runtime.engine.start()
    random = np.random.default_rng(1)
    prompt = random.integers(3, runtime.model_config.vocab_size, tokens - OUTPUT_TOKENS, np.int32)
    ask(runtime, {"warm up": prompt[-3000:]})
    timed.steps.clear()
    ask(runtime, {"cold": prompt})
    depth = 2048
    while depth <= tokens:
        for batch in BATCHES:
            ask(runtime, {f"{depth} {batch} {i}": prompt[: depth - OUTPUT_TOKENS - i] for i in range(batch)})
        fresh = random.integers(3, runtime.model_config.vocab_size, 2500, np.int32)
        ask(runtime, {f"{depth} beside": prompt[: depth - OUTPUT_TOKENS], f"{depth} fresh": fresh})
        depth *= 2
    runtime.engine.close()
    return timed.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=262144)
    options = parser.parse_args()
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for work, seconds in measure(options.tokens):
            chunks = ";".join(f"{new}+{past}" for new, past in work.chunks)
            decodes = (work.decodes, work.decode_tokens, work.decode_context, work.longest_context)
            writer.writerow((chunks, *decodes, work.sampled, f"{seconds:.6f}"))
    print(json.dumps({"commit": commit_name()} | machine_facts()))


if __name__ == "__main__":
    main()
