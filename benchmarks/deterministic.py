"""What deterministic mode costs: `python benchmarks/deterministic.py OUT.jsonl [PAIRS]`, one line per run.

The embedded model in a process of its own per run, off and on by turns, one thread: reading 4,096 tokens, decoding 48
for one request, and for eight at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from thalweg.cli.demo import machine_facts
from thalweg.config.options import EngineOptions
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.types import Event, GenerateRequest, SamplingParams, TokenEvent


class Times:
    """When the tokens of one request came."""

    def __init__(self) -> None:
        self.tokens: list[float] = []
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append(time.perf_counter())
            if event.finish is not None:
                self.done.set()


def rates(runtime: Runtime, requests: int, prompt: int, output: int) -> tuple[float, float]:
    """Prompt tokens per second up to the last first token; output tokens per second from the first to the last."""
    begin = time.perf_counter()
    heard = []
    for i in range(requests):
        tokens = np.random.default_rng(i).integers(2, 2000, prompt).astype(np.int32)
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        heard.append(Times())
        runtime.engine.submit(GenerateRequest(f"{begin} {i}", tokens, sampling), heard[-1])
    for times in heard:
        times.done.wait()
    first, last = [t.tokens[0] for t in heard], [t.tokens[-1] for t in heard]
    return requests * prompt / (max(first) - begin), requests * (output - 1) / (max(last) - min(first))


def measure(deterministic: bool) -> dict[str, object]:
    options = EngineOptions(
        deterministic=deterministic, threads=1, enable_prefix_caching=False, kv_cache_memory=300_000_000
    )
    runtime = build_runtime(options)
    runtime.engine.start()
    rates(runtime, 1, 300, 4)
    figures = {
        "deterministic": deterministic,
        "prefill_tokens_per_second": rates(runtime, 1, 4096, 2)[0],
        "decode_tokens_per_second": rates(runtime, 1, 1000, 48)[1],
        "decode_8_tokens_per_second": rates(runtime, 8, 16, 48)[1],
    }
    runtime.engine.close()
    return figures


def main() -> None:
    if sys.argv[1] in ("--off", "--on"):
        print(json.dumps(measure(sys.argv[1] == "--on")))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with Path(sys.argv[1]).open("a") as file:
        for run in range(int(sys.argv[2]) if len(sys.argv) > 2 else 5):
            for flag in ("--off", "--on"):
                result = subprocess.run([sys.executable, __file__, flag], stdout=subprocess.PIPE, text=True, check=True)
                facts = {"run": run + 1, "commit": commit.stdout.strip(), **json.loads(result.stdout)}
                file.write(json.dumps(facts | machine_facts()) + "\n")
                file.flush()
                print(result.stdout, end="")


if __name__ == "__main__":
    main()
