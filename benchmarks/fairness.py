"""Company of a long prefill: `python -m benchmarks.fairness OUT.jsonl [--runs N] [--long N]`, against the real server.

Each run measures, first with nothing else and then while one cold prompt of `--long` tokens is read: the time to the
first token of prompts of 2,048 tokens, all different, and the time between the tokens of one running answer. One JSON
line per run, raw samples included.
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

from benchmarks.commit import commit_name
from thalweg.cli.demo import machine_facts, running_server
from thalweg.evaluation.endpoint import Client

SHORT_TOKENS = 2048
PATH = "/v1/completions"


class Ids:
    """Prompts of random ids: no two begin alike, so that nothing is served from the cache."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def prompt(self, tokens: int) -> list[int]:
        return [int(i) for i in self._random.integers(100, 1900, tokens)]


def stream(client: Client, prompt: list[int], output: int, stop: threading.Event | None = None) -> list[float]:
    """Seconds from the request to each token, and when it was sent as the first entry."""
    fields = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0, "stream": True}
    begin = time.perf_counter()
    times = [begin]
    for kind, text in client.events(PATH, fields):
        if kind == "data" and json.loads(text)["choices"]:
            times.append(time.perf_counter())
        if stop is not None and stop.is_set():
            break
    return times


class Decoding:
    """One answer that is streamed in the background until it is told to stop."""

    def __init__(self, client: Client, ids: Ids) -> None:
        self._stop = threading.Event()
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._read, args=(client, ids.prompt(256)))
        self._thread.start()

    def _read(self, client: Client, prompt: list[int]) -> None:
        fields = {"prompt": prompt, "max_tokens": 100_000, "ignore_eos": True, "temperature": 0, "stream": True}
        for kind, _ in client.events(PATH, fields):
            if kind == "data":
                self.times.append(time.perf_counter())
            if self._stop.is_set():
                return

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def tokens_per_second(self, begin: float, end: float) -> float:
        return sum(begin <= t <= end for t in self.times) / (end - begin)


def shorts(client: Client, ids: Ids, pause: float, until: threading.Event | None, most: int) -> list[float]:
    """Times to first token of short prompts, one after the other with pauses."""
    found = []
    while len(found) < most and not (until is not None and until.is_set()):
        sent, first, *_ = stream(client, ids.prompt(SHORT_TOKENS), 2)
        found.append(first - sent)
        time.sleep(pause)
    return found


def run(long_tokens: int, seed: int, pause: float) -> dict[str, Any]:
    ids = Ids(seed)
    with running_server("default", "--max-model-len", str(2 * long_tokens)) as (client, _):
        shorts(client, ids, 0, None, 3)
        idle = shorts(client, ids, pause, None, 40)
        alone = stream(client, ids.prompt(long_tokens), 1)
        decoding = Decoding(client, ids)
        time.sleep(3)
        begin = time.perf_counter()
        time.sleep(5)
        idle_speed = decoding.tokens_per_second(begin, time.perf_counter())
        over, long = threading.Event(), []

        def read() -> None:
            long.extend(stream(client, ids.prompt(long_tokens), 1))
            over.set()

        reader = threading.Thread(target=read)
        begin = time.perf_counter()
        reader.start()
        busy = shorts(client, ids, pause, over, 10_000)
        reader.join()
        speed = decoding.tokens_per_second(begin, long[1])
        decoding.stop()
    return {
        "long_tokens": long_tokens,
        "short_tokens": SHORT_TOKENS,
        "pause_seconds": pause,
        "idle_ttft_p50_seconds": median(idle),
        "idle_ttft_p99_seconds": float(np.percentile(idle, 99)),
        "ttft_p50_seconds": median(busy),
        "ttft_p99_seconds": float(np.percentile(busy, 99)),
        "ttft_p99_ratio": float(np.percentile(busy, 99) / np.percentile(idle, 99)),
        "idle_decode_tokens_per_second": idle_speed,
        "decode_tokens_per_second": speed,
        "decode_ratio": speed / idle_speed,
        "long_ttft_alone_seconds": alone[1] - alone[0],
        "long_ttft_seconds": long[1] - long[0],
        "idle_ttft_seconds": idle,
        "ttft_seconds": busy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--long", type=int, default=200_000)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between short prompts")
    options = parser.parse_args()
    with options.out.open("a") as file:
        for number in range(options.runs):
            facts = {"run": number + 1, "commit": commit_name()}
            facts |= run(options.long, number, options.pause) | machine_facts()
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(json.dumps({k: v for k, v in facts.items() if not isinstance(v, list)}, indent=1))


if __name__ == "__main__":
    main()
