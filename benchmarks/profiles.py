"""Five shapes of traffic under five endpoint profiles and the defaults: `python benchmarks/profiles.py OUT.jsonl`.

The real scheduler and cache on a virtual clock, with the fitted step times of our CPU engine and the embedded model,
and the pools that `serve` makes of it. Each shape comes at a rate that the endpoint can serve; where the
measure is what a task costs or the throughput, at one that floods it. A refused
request, and the turns that it would have led to, count as never answered.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.commit import commit_name
from thalweg.cli.demo import machine_facts
from thalweg.config.model_parse import load_model_config
from thalweg.config.options import EngineOptions, load_options, profile_names
from thalweg.planner.engine_options import spec_of
from thalweg.planner.outcome import SimulationResult
from thalweg.planner.scenario import load_cost
from thalweg.planner.simulator import Simulation
from thalweg.planner.workload import workload_sessions

DEFAULTS = "defaults"
SHOWN = (
    "window_policy", "checkpoint_interval", "max_num_seqs", "max_num_batched_tokens", "kv_host_ratio", "max_waiting",
    "max_queue_seconds",
)  # fmt: skip
POOL_BYTES = 256 * 2**20  # holds minutes of these loads, as the usual 4 GiB hold hours: what is evicted shows sooner


@dataclass(frozen=True, slots=True)
class Shape:
    """Traffic of one kind: sessions per second, requests in all, what is measured, whether less is better."""

    workload: str
    profile: str
    rate: float
    requests: int
    measure: str
    less: bool = True


SHAPES = (
    Shape("long-context-agents", "long-agents", 0.4, 300, "engine_seconds_per_task"),
    Shape("coding-agents", "coding-agents", 0.11, 250, "ttft_seconds_p90"),
    Shape("short-chat", "short-chat", 12.0, 1200, "ttft_seconds_p90"),
    Shape("rl-rollouts", "rollouts", 1.0, 256, "output_tokens_per_second", less=False),
    Shape("mixed", "mixed", 1.0, 450, "seconds_per_token_p90"),
)  # fmt: skip


def figures(result: SimulationResult) -> dict[str, Any]:
    """What is measured of any shape."""
    rows = result.requests
    done = np.array([word == "length" for word in rows.words("finish")], bool)
    arrived, first, ended = (rows.seconds(name) for name in ("arrived", "first_token", "finished"))
    never = np.full(result.skipped_turns, np.inf)  # turns that were not asked, because one before them was refused
    ttft = np.concatenate([np.where(done, first - arrived, np.inf), never])
    each = np.where(done, (ended - arrived) / np.maximum(1, rows.counts("output_tokens")), np.inf)
    each = np.concatenate([each, never])
    names = [name.split("/")[0] for name in rows.words("request")]
    tasks = set(names)
    broken = {name for name, whole in zip(names, done, strict=True) if not whole}
    summary = result.summary()
    return {
        "ttft_seconds_p90": _p90(ttft),
        "seconds_per_token_p90": _p90(each),
        "engine_seconds_per_task": _busy(result) / max(1, len(tasks - broken)),
        "output_tokens_per_second": summary["output_tokens_per_second"],
        "hit_rate": summary["hit_rate"],
        "busy_share": summary["replicas"][0]["busy_share"],
        "preemptions": summary["preemptions"],
        "refused": int((~done).sum()),
        "evicted": summary["evicted"],
    }


def _p90(values: npt.NDArray[np.float64]) -> float | None:
    """None: a tenth or more never came."""
    found = float(np.quantile(values, 0.9, method="higher"))
    return found if np.isfinite(found) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _busy(result: SimulationResult) -> float:
    return sum(replica.busy_seconds for replica in result.replicas)


def measure(shape: Shape, options: EngineOptions, seed: int) -> dict[str, Any]:
    """One simulation."""
    spec = spec_of(options, load_model_config("default"), pool_memory=POOL_BYTES, formats=("float32", "float32"))
    simulation = Simulation(spec, load_cost("engine"))
    return figures(simulation.run(workload_sessions(shape.workload, shape.requests, seed, shape.rate)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=[shape.workload for shape in SHAPES])
    parser.add_argument("--profiles", nargs="*", default=[DEFAULTS, *profile_names()])
    parser.add_argument("--flags", type=json.loads, default={}, help="options over every profile, as JSON")
    given = parser.parse_args()
    for shape in SHAPES:
        for name in given.profiles if shape.workload in given.shapes else ():
            profile = None if name == DEFAULTS else name
            options = load_options(given.flags, profile=profile, environment={})
            began = time.perf_counter()
            runs = [measure(shape, options, seed) for seed in range(given.seeds)]
            row = {
                "commit": commit_name(), "shape": shape.workload, "profile": name, "own": name == shape.profile,
                "options": {name: getattr(options, name) for name in SHOWN},
                "measure": shape.measure, "less_is_better": shape.less,
                "value": _mean([run[shape.measure] for run in runs]), "rate": shape.rate,
                "requests": shape.requests, "flags": given.flags, "runs": runs,
                "seconds": time.perf_counter() - began, **machine_facts(),
            }  # fmt: skip
            print(f"{shape.workload:20} {name:14} {row['value'] or float('inf'):10.4f} hit {runs[0]['hit_rate']:.3f} "
                  f"busy {runs[0]['busy_share']:.2f} preempt {runs[0]['preemptions']} refused {runs[0]['refused']} "
                  f"evicted {runs[0]['evicted']} {row['seconds']:.0f} s", flush=True)  # fmt: skip
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
