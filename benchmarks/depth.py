"""What a token costs at which depth: `python benchmarks/depth.py OUT.jsonl --model DIR [--tokens N] [--threads N]`.

One engine in this process reads one long random prompt by steps of a fixed size and notes how long each took; then it
continues prefixes of it, from the cache, at several depths. Prefill seconds up to depth L are fitted as a L + b L^2.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.commit import commit_name
from benchmarks.million import peak_rss_bytes
from benchmarks.models import SHAPES, make_model
from thalweg.cli.demo import machine_facts
from thalweg.config.options import load_options
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.types import GenerateRequest, PrefillProgress, SamplingParams, TokenEvent

OUTPUT_TOKENS = 33


class Listener:
    """Notes when which prompt tokens were done, and when each output token came."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.steps: list[tuple[int, float]] = [(0, 0.0)]
        self.tokens: list[float] = []
        self.done = threading.Event()

    def __call__(self, event: PrefillProgress | TokenEvent) -> None:
        now = time.perf_counter() - self.begin
        if isinstance(event, PrefillProgress):
            self.steps.append((event.done_tokens, now))
            return
        assert event.error is None, event.error
        self.tokens.append(now)
        if event.finish is not None:
            self.done.set()


def ask(runtime: Runtime, name: str, prompt: np.ndarray) -> Listener:
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS)
    listener = Listener()
    runtime.engine.submit(GenerateRequest(name, prompt, sampling), listener)
    listener.done.wait()
    return listener


def fitted(steps: list[tuple[int, float]]) -> tuple[float, float]:
    """a and b of seconds(L) = a L + b L^2, least squares over the time of each step, which is robust to a slow one."""
    ends, seconds = (np.array(column, float) for column in zip(*steps, strict=True))
    tokens, middle = np.diff(ends), (ends[1:] + ends[:-1]) / 2
    per_token = np.diff(seconds) / tokens
    b2, a = np.polyfit(middle, per_token, 1, w=np.sqrt(tokens))
    return float(a), float(b2) / 2


def rates(steps: list[tuple[int, float]], total: int) -> dict[str, float]:
    """Tokens per second in the last eighth before each power of two."""
    ends = np.array([end for end, _ in steps])
    result = {}
    depth = 4096
    while depth <= total:
        first, last = np.searchsorted(ends, depth * 7 // 8), np.searchsorted(ends, depth)
        last = min(last, len(ends) - 1)
        if last > first:
            result[str(depth)] = float((steps[last][0] - steps[first][0]) / (steps[last][1] - steps[first][1]))
        depth *= 2
    return result


def measure(model: str, tokens: int, flags: dict[str, Any]) -> dict[str, Any]:
    runtime = build_runtime(load_options({"model": model, **flags}, environment={}))
    runtime.engine.start()
    prompt = np.random.default_rng(1).integers(3, runtime.model_config.vocab_size, tokens - OUTPUT_TOKENS, np.int32)
    ask(runtime, "warm up", prompt[-2000:])
    cpu = time.process_time()
    cold = ask(runtime, "cold", prompt)
    cpu = time.process_time() - cpu
    decode = {}
    depth = 2048
    while depth <= tokens:
        again = ask(runtime, f"at {depth}", prompt[: depth - OUTPUT_TOKENS])
        decode[str(depth)] = 1.0 / median(np.diff(again.tokens))
        depth *= 2
    peak = peak_rss_bytes(os.getpid())
    runtime.engine.close()
    a, b = fitted(cold.steps)
    return {
        "context_tokens": tokens,
        "prefill_seconds": cold.tokens[0],
        "prefill_cpu_seconds": cpu,
        "prefill_tokens_per_second": len(prompt) / cold.tokens[0],
        "prefill_tokens_per_second_at": rates(cold.steps, tokens),
        "seconds_per_token": a,
        "seconds_per_token_squared": b,
        "decode_tokens_per_second_at": decode,
        "peak_rss_bytes": peak,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="default", help=f"default, a directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kv-cache-memory", default="1GiB")
    options = parser.parse_args()
    flags = {"threads": options.threads, "kernels": options.kernels, "kv_cache_memory": options.kv_cache_memory}
    with tempfile.TemporaryDirectory() as folder, options.out.open("a") as file:
        model = make_model(options.model, Path(folder)) if options.model in SHAPES else options.model
        for number in range(options.runs):
            facts = {"run": number + 1, "commit": commit_name(), "model": options.model, **flags}
            facts |= measure(model, options.tokens, flags) | machine_facts()
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
