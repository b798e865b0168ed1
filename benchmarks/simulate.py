"""How fast the simulator is: `python benchmarks/simulate.py OUT.jsonl [--requests N]`.

Requests of short chats through one replica of Flash on a B200, whose caches are far too small for all of them: units
are inserted and evicted all the time. `cpu_seconds` are the process's own: the machine may have others to serve.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path

from benchmarks.commit import commit_name
from benchmarks.million import peak_rss_bytes
from thalweg.cli.demo import machine_facts
from thalweg.planner.scenario import Scenario, sessions_of, simulation_of


def measure(scenario: Scenario) -> dict[str, object]:
    """One simulation and what it took."""
    simulation = simulation_of(scenario)
    gc.disable()  # a prefix index leaves no garbage in cycles, and looking for it takes longer with every unit
    began, cpu = time.perf_counter(), time.process_time()
    result = simulation.run(sessions_of(scenario))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    gc.enable()
    return {
        "workload": scenario.workload,
        "requests": len(result.requests),
        "cpu_seconds": cpu,
        "seconds": seconds,
        "requests_per_cpu_second": len(result.requests) / cpu,
        "peak_rss_bytes": peak_rss_bytes(os.getpid()),
        "virtual_seconds": result.makespan,
        "summary": result.summary(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workload", default="short-chat")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--layout", default="tp1")
    parser.add_argument("--pool-memory", type=int, default=8 * 2**30)
    parser.add_argument("--commit", help="what is measured, where this is no checkout")
    options = parser.parse_args()
    scenario = Scenario(
        "flash", workload=options.workload, requests=options.requests, rate=options.rate, hardware="B200",
        layout=options.layout, pool_memory=options.pool_memory,
    )  # fmt: skip
    row = {"commit": options.commit or commit_name(), "layout": options.layout, **measure(scenario), **machine_facts()}
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
