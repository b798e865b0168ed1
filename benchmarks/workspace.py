"""Temporary memory of steps by depth: `python -m benchmarks.workspace OUT.jsonl [--tokens N] [--at N ...]`.

One cold prompt is computed on the embedded model. Around every step the kernel's own mark of the process's largest
resident size is reset and read: what a step added to what was resident before it is its workspace, whoever allocated
it, with the cache rows that it wrote for the first time. Freed memory is given back before each step, so that none of
it is used unseen.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import threading
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from thalweg.cli.demo import machine_facts
from thalweg.config.options import load_options
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.runner import Runner
from thalweg.engine.runtime import build_runtime
from thalweg.types import GenerateRequest, SamplingParams, TokenEvent

_STEPS = 31  # up to each depth; their median counts


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "this kernel does not say"
    return int(found.group(1)) * 1024


class Watched:
    """A runner beside which the memory of each step is noted: (last token, bytes)."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._trim = ctypes.CDLL(None).malloc_trim
        self.steps: list[tuple[int, int]] = []

    def run(self, plan: StepPlan) -> StepResult:
        self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = self._runner.run(plan)
        self.steps.append((plan.sequences[0].end, _status("VmHWM") - before))
        return result

    def bytes_at(self, depth: int) -> float:
        """Median of the full steps that end last at or before a depth."""
        return median([size for end, size in self.steps if end <= depth][-_STEPS:])


def measure(tokens: int, flags: dict[str, Any]) -> Watched:
    """Compute a prompt of so many tokens, cold."""
    runtime = build_runtime(load_options(flags, environment={}))
    watched = Watched(runtime.engine._runner)
    runtime.engine._runner = watched
    runtime.engine.start()
    prompt = np.random.default_rng(1).integers(100, 1900, tokens).astype(np.int32)
    done = threading.Event()

    def listen(event: Any) -> None:
        if isinstance(event, TokenEvent) and event.finish is not None:
            done.set()

    runtime.engine.submit(GenerateRequest("prompt", prompt, SamplingParams(temperature=0, max_tokens=1)), listen)
    done.wait()
    runtime.engine.close()
    return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1_048_000)
    parser.add_argument("--at", type=int, nargs="+", default=[65_536, 262_144, 1_048_000])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    watched = measure(options.tokens, {"threads": options.threads, "kv_cache_memory": "1GiB"})
    sizes = {str(depth): watched.bytes_at(depth) for depth in options.at}
    facts = {
        "commit": commit.stdout.strip(),
        "threads": options.threads,
        "workspace_bytes_at": sizes,
        "ratio": sizes[str(options.at[-1])] / sizes[str(options.at[0])],
    }
    with options.out.open("a") as file:
        file.write(json.dumps(facts | machine_facts()) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
