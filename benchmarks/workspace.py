"""Temporary memory of steps by depth: `python -m benchmarks.workspace OUT.jsonl [--tokens N] [--at N ...]`.

One cold prompt is computed on the embedded model, and the bytes that torch allocates in each step are counted, freed or
not: an upper bound of what is there at a time. Room that compiled kernels take for themselves is bounded by tiles and
not in it. Beside it stands what the step added to the largest resident size of the process, from the kernel's own
mark, which is reset before each step: coarse, for freed memory is used again unseen.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.commit import commit_name
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


class Allocated(TorchDispatchMode):
    """Bytes of all storages that operations made, freed ones included, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                size = x.untyped_storage().nbytes()
                self.total, self.largest = self.total + size, max(self.largest, size)
        return result


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What one step allocated. `end` is the position behind its last token."""

    end: int
    total_bytes: int
    largest_bytes: int
    resident_bytes: int


class Watched:
    """A runner beside which the memory of each step is noted."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._trim = ctypes.CDLL(None).malloc_trim
        self.steps: list[StepMemory] = []

    def run(self, plan: StepPlan) -> StepResult:
        self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        with Allocated() as allocated:
            result = self._runner.run(plan)
        end = plan.sequences[0].end
        self.steps.append(StepMemory(end, allocated.total, allocated.largest, _status("VmHWM") - before))
        return result

    def at(self, depth: int) -> dict[str, float]:
        """Medians of the last steps that end at or before a depth."""
        steps = [step for step in self.steps if step.end <= depth][-_STEPS:]
        return {
            name: median(getattr(step, name) for step in steps)
            for name in ("total_bytes", "largest_bytes", "resident_bytes")
        }


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
    parser.add_argument("--at", type=int, nargs="+", default=[65_536, 262_144, 1_040_000])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    watched = measure(options.tokens, {"threads": options.threads, "kv_cache_memory": "1GiB"})
    sizes = {str(depth): watched.at(depth) for depth in options.at}
    facts = {
        "commit": commit_name(),
        "threads": options.threads,
        "workspace_at": sizes,
        "ratio": sizes[str(options.at[-1])]["total_bytes"] / sizes[str(options.at[0])]["total_bytes"],
    }
    with options.out.open("a") as file:
        file.write(json.dumps(facts | machine_facts()) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
