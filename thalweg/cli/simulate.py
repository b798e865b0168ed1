"""`thalweg simulate`: a trace or a shape of traffic through the real scheduler and cache, without a model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.config.options import parse_bytes
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.planner.scenario import Scenario


def simulate(
    trace: Annotated[
        Path | None, typer.Argument(help="JSON lines: Mooncake's, or sessions (docs/simulate.md).")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="long-context-agents, coding-agents, short-chat, rl-rollouts or mixed, in place of a trace."),
    ] = None,
    requests: Annotated[int, typer.Option(help="Of a workload.")] = 1000,
    rate: Annotated[float | None, typer.Option(help="Sessions per second of a workload; its own if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of a workload and of speculation.", min=0)] = 0,
    model: Annotated[str, typer.Option(help="Model directory, config.json, `default`, `flash` or `pro`.")] = "flash",
    hardware: Annotated[str | None, typer.Option(help="A GPU, such as B200; steps are priced from its tables.")] = None,
    layout: Annotated[
        str, typer.Option(help="tp8, dp8-ep8, tp4-dp2-ep8: each data parallel rank serves alone.")
    ] = "tp1",
    framework: Annotated[str, typer.Option(help="Whose kernels: sglang, vllm or trtllm.")] = "sglang",
    quant: Annotated[str, typer.Option(help="Of experts: mxfp4, nvfp4, fp8, bf16.")] = "mxfp4",
    cost: Annotated[
        str | None,
        typer.Option(
            help="In place of hardware: coefficients (.json), measured steps (.csv), or `engine`: our own on a CPU."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Engines of that layout.")] = 1,
    routing: Annotated[str, typer.Option(help="round-robin, least-loaded, sticky or prefix.")] = "sticky",
    pool_memory: Annotated[
        str | None, typer.Option(help="Of a rank's caches, such as 100GiB; what the hardware leaves if left out.")
    ] = None,
    host_memory: Annotated[str, typer.Option(help="Host tier of each rank; 0: none.")] = "0",
    disk_space: Annotated[str, typer.Option(help="Disk tier of each rank; 0: none.")] = "0",
    max_num_seqs: Annotated[int, typer.Option(help="Running requests of a rank.", min=1)] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=2)] = 8192,
    window_policy: Annotated[str, typer.Option(help="As for `serve`.")] = "boundary",
    checkpoint_interval: Annotated[int, typer.Option(help="As for `serve`.", min=0)] = 4096,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Reuse prefixes.")] = True,
    max_queue_seconds: Annotated[float | None, typer.Option(help="As for `serve`.")] = None,
    drafts: Annotated[int, typer.Option(help="Speculative tokens of a decode step; 0: none.", min=0)] = 0,
    accepted: Annotated[float, typer.Option(help="Mean tokens that such a step yields, with the sure one.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for every request here.")] = None,
) -> None:
    """Simulate a deployment: first-token times, pace, hits, evictions and peak use, for traffic that you describe."""
    from thalweg.planner.scenario import Scenario

    scenario = Scenario(
        model, trace, workload, requests, rate, seed, hardware, layout, framework, quant, cost, replicas, routing,
        None if pool_memory is None else parse_bytes(pool_memory, "pool_memory"),
        parse_bytes(host_memory, "host_memory"), parse_bytes(disk_space, "disk_space"), max_num_seqs,
        max_num_batched_tokens, window_policy, checkpoint_interval, enable_prefix_caching,
        max_queue_seconds=max_queue_seconds, drafts=drafts, accepted=accepted,
    )  # fmt: skip
    facts = _run(scenario, csv)
    _written(out, lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _written(path: Path | None, write: Callable[[Path], object]) -> None:
    try:
        if path is not None:
            write(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param="out") from error


def _run(scenario: Scenario, rows: Path | None) -> dict[str, Any]:
    from thalweg.cli.progress import bar
    from thalweg.planner.scenario import sessions_of, simulation_of

    sessions = sessions_of(scenario)
    simulation = simulation_of(scenario)
    total = scenario.requests if scenario.workload else None
    began = time.perf_counter()
    with bar() as progress:
        task = progress.add_task("requests", total=total)
        result = simulation.run(sessions, lambda done: progress.update(task, completed=done))
    took = time.perf_counter() - began
    _written(rows, result.requests.write_csv)
    return {**result.summary(), "simulated_in_seconds": took}


def _print(facts: dict[str, Any]) -> None:
    from thalweg.cli.progress import print_table

    spreads = ("ttft_seconds", "queue_seconds", "tpot_seconds", "end_to_end_seconds")
    rows = []
    for name in spreads:
        spread = facts[name] or {}
        label = name.removesuffix("_seconds").replace("_", " ")
        rows.append((label, *(_seconds(spread.get(p)) for p in ("mean", "p50", "p90", "p99", "most"))))
    print_table(("seconds", "mean", "p50", "p90", "p99", "most"), rows)
    cached = facts["cached_tokens"]
    computed = facts["prompt_tokens"] - sum(cached.values())
    print_table(
        ("prompt tokens", "count", "share"),
        [
            (name, f"{count:,}", f"{count / max(1, facts['prompt_tokens']):.1%}")
            for name, count in (*cached.items(), ("computed", computed))
        ],
    )
    print_table(
        ("rank", "steps", "busy", "preemptions", "most waiting", "fullest pool"),
        [
            (str(i), f"{r['steps']:,}", f"{r['busy_share'] or 0:.0%}", f"{r['preemptions']:,}",
             f"{r['most_waiting']:,}", _fullest(r["peak_use"]))
            for i, r in enumerate(facts["replicas"])
        ],
    )  # fmt: skip
    counts = ", ".join(f"{count:,} {what}" for what, count in facts["finished"].items())
    print(f"{facts['requests']:,} requests ({counts}) in {facts['makespan_seconds'] or 0:,.1f} s of virtual time")
    outputs, prompts = facts["output_tokens_per_second"] or 0, facts["prompt_tokens_per_second"] or 0
    print(f"{outputs:,.1f} output and {prompts:,.1f} prompt tokens/s, hit rate {facts['hit_rate']:.1%}")
    evicted = ", ".join(f"{count:,} for {group}" for group, count in facts["evicted"].items()) or "nothing"
    print(f"{facts['preemptions']:,} preemptions; evicted: {evicted}")
    if facts["skipped_turns"]:
        print(f"{facts['skipped_turns']:,} turns were not asked: one before them was cancelled or refused")
    rate = facts["requests"] / max(1e-9, facts["simulated_in_seconds"])
    print(f"simulated in {facts['simulated_in_seconds']:,.1f} s, {rate:,.0f} requests/s")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}" if value < 1 else f"{value:,.2f}"


def _fullest(peaks: dict[str, dict[str, int]]) -> str:
    group = max(peaks, key=lambda g: peaks[g]["blocks"] / max(1, peaks[g]["of"]))
    return f"{group} {peaks[group]['blocks'] / max(1, peaks[group]['of']):.0%}"
