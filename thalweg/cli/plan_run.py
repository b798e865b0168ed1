"""`thalweg plan --model ... --hardware ...`: which configuration to run, with proof, price and how sure that is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.config.options import parse_bytes
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.planner.accuracy import Score
    from thalweg.planner.advice import Advice, Span, Verdict
    from thalweg.planner.platform import Platform
    from thalweg.planner.serving_rows import Comparison

COLUMNS = (
    "rank", "layout", "engines", "gpus", "chunk_tokens", "max_num_seqs", "window_policy", "checkpoint_interval",
    "tiers", "drafts", "meets", "missed", "ttft_seconds", "ttft_low", "ttft_high", "tpot_seconds", "tpot_low",
    "tpot_high", "attained", "output_tokens_per_second", "hit_rate", "busy", "sessions", "rank_tokens",
    "gpu_seconds_per_task", "dollars_per_task", "bottleneck", "extrapolated_share", "bound_share",
)  # fmt: skip


def run(
    trace: Annotated[Path | None, typer.Option(help="JSON lines: Mooncake's, or sessions (docs/simulate.md).")] = None,
    workload: Annotated[
        str | None, typer.Option(help="long-context-agents, coding-agents, short-chat, rl-rollouts or mixed.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory, config.json, `default`, `flash` or `pro`.", show_default=False)
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="H100, H200, B200, GB200, B300, GB300, or the profile.json of a measured endpoint.")
    ] = "B200",
    gpus: Annotated[int, typer.Option(help="At most so many; of a measured endpoint: copies of it.", min=1)] = 8,
    requests: Annotated[int, typer.Option(help="Simulated of the traffic.", min=1)] = 200,
    rate: Annotated[float | None, typer.Option(help="Sessions per second of a workload; its own if left out.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Objective: seconds to the first token.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Objective: seconds per output token.")] = None,
    percentile: Annotated[float, typer.Option(help="Of requests, for both objectives.", min=1, max=99.9)] = 90.0,
    price: Annotated[float | None, typer.Option(help="Dollars per GPU hour.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="That a rank may take as its host tier; 64GiB, or what its pools take; 0: none.")
    ] = None,
    disk_space: Annotated[str, typer.Option(help="That a rank may take as its disk tier; 0: none.")] = "0",
    pool_memory: Annotated[str | None, typer.Option(help="Of a measured endpoint, where it tells no capacity.")] = None,
    drafts: Annotated[int, typer.Option(help="Speculative tokens of a step, to be tried; 0: none.", min=0)] = 0,
    accepted: Annotated[float, typer.Option(help="Mean tokens that such a step yields, with the sure one.")] = 1.0,
    framework: Annotated[str, typer.Option(help="Whose kernels: sglang, vllm or trtllm.")] = "sglang",
    quant: Annotated[str, typer.Option(help="Of experts: mxfp4, nvfp4, fp8, bf16.")] = "mxfp4",
    simulated: Annotated[int, typer.Option(help="Layouts that are simulated, best first.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of a workload and of speculation.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the report here: one page that needs nothing else.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a row per configuration here.")] = None,
    out_config: Annotated[Path | None, typer.Option(help="Write the best one's options here, for `serve`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Rank configurations for a load: memory proof, times with intervals, cost per task; or which budget fails."""
    from thalweg.planner.advice import Objectives, Question
    from thalweg.planner.demand import demand_of
    from thalweg.planner.layout import Speculation

    platform = _platform(model, hardware, gpus, framework, quant, pool_memory)
    demand = demand_of(trace=trace, workload=workload, requests=requests, seed=seed, rate=rate)
    question = Question(
        Objectives(ttft, tpot, percentile), price, _host(host_memory, platform),
        parse_bytes(disk_space, "disk_space"), Speculation(drafts, accepted) if drafts else None, simulated, seed,
    )  # fmt: skip
    advice = _advised(platform, demand, question)
    scores, comparisons = accuracy(platform) if advice.best else ([], ())
    if csv_file is not None:
        _written(csv_file, lambda path: _write_csv(path, advice))
    if html is not None:
        _written(html, lambda path: _write_page(path, advice, scores, comparisons))
    if out_config is not None:
        _written(out_config, lambda path: _write_config(path, advice))
    if as_json:
        print(json.dumps(plain(advice, scores), indent=2))
    else:
        _print(advice, scores)
    if advice.best is None:
        raise typer.Exit(1)


def _host(given: str | None, platform: Platform) -> int:
    from thalweg.planner.platform import MeasuredEndpoint

    if given is not None:
        return parse_bytes(given, "host_memory")
    return platform.pool_bytes if isinstance(platform, MeasuredEndpoint) else 64 * 2**30


def _platform(
    model: str | None, hardware: str, gpus: int, framework: str, quant: str, pool_memory: str | None
) -> Platform:
    from thalweg.config.model_parse import load_model_config
    from thalweg.planner.platform import Accelerators

    if hardware.endswith(".json"):
        from thalweg.planner.endpoint import measured_endpoint

        pool = None if pool_memory is None else parse_bytes(pool_memory, "pool_memory")
        return measured_endpoint(Path(hardware), load_model_config(model or "default"), gpus, pool)
    return Accelerators(load_model_config(model or "flash"), hardware, gpus, framework, quant)


def _advised(platform: Platform, demand: Any, question: Any) -> Advice:
    from thalweg.cli.progress import bar
    from thalweg.planner.advice import advise

    with bar() as progress:
        task = progress.add_task("closed forms", total=None)

        def say(what: str) -> None:
            progress.update(task, advance=1, description=f"simulating {what}")

        return advise(platform, demand, question, say)


def accuracy(platform: Platform) -> tuple[list[Score], Sequence[Comparison]]:
    """Measured errors of what a verdict rests on: the layers of `plan check`, or an endpoint's own held-out samples;
    and published figures beside predictions."""
    from thalweg.planner.check import check
    from thalweg.planner.platform import MeasuredEndpoint

    if isinstance(platform, MeasuredEndpoint):
        return list(platform.scores), ()
    report = check()
    scores = [score for score in report.scores if ":" not in score.slice and score.layer != "step"]
    return scores, report.comparisons


def _written(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param="out") from error


def row_of(rank: int, verdict: Verdict) -> dict[str, Any]:
    """One configuration as plain values."""
    from thalweg.planner.cost import Origin

    chosen = verdict.candidate
    values = (
        rank, str(chosen.layout), chosen.engines, chosen.gpus, chosen.chunk_tokens, chosen.max_num_seqs,
        chosen.window_policy, chosen.checkpoint_interval, chosen.tiers,
        chosen.speculation.drafts if chosen.speculation else 0, not verdict.missed, "; ".join(verdict.missed),
        verdict.ttft.value, verdict.ttft.low, verdict.ttft.high, verdict.tpot.value, verdict.tpot.low,
        verdict.tpot.high, verdict.attained, verdict.output_rate, verdict.hit_rate, verdict.busy, verdict.sessions,
        verdict.token_capacity, verdict.task_gpu_seconds, verdict.task_dollars, verdict.bottleneck,
        verdict.origins[Origin.EXTRAPOLATED], verdict.origins[Origin.BOUND],
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _write_page(path: Path, advice: Advice, scores: Sequence[Score], comparisons: Sequence[Comparison]) -> None:
    from thalweg.cli.plan_page import page

    path.write_text(page(advice, scores, comparisons), encoding="utf-8")


def _write_config(path: Path, advice: Advice) -> None:
    from thalweg.planner.recommendation import config_text

    if advice.best is None:
        raise ConfigError("out_config: nothing serves this load, so there are no options to write", param="out_config")
    path.write_text(config_text(advice, advice.best), encoding="utf-8")


def _write_csv(path: Path, advice: Advice) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row_of(i, verdict) for i, verdict in enumerate(advice.verdicts, 1))
        for refusal in advice.refused:
            writer.writerow({"layout": refusal.what, "meets": False, "missed": f"{refusal.budget}: {refusal.missing}"})


def plain(advice: Advice, scores: Sequence[Score]) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    from dataclasses import asdict

    return {
        "platform": advice.platform.name,
        "workload": advice.demand.name,
        "profile": advice.demand.profile,
        "ranked": [
            {**row_of(i, v), "proof_bytes": dict(v.proof), "notes": list(v.notes)}
            for i, v in enumerate(advice.verdicts, 1)
        ],
        "infeasible": [asdict(refusal) for refusal in advice.refused],
        "accuracy": [asdict(score) for score in scores],
    }


def _print(advice: Advice, scores: Sequence[Score]) -> None:
    from thalweg.cli.progress import print_table

    demand, question = advice.demand, advice.question
    print(
        f"{demand.name} on {advice.platform.name}: {demand.requests:,} requests, {demand.prompt_tokens:,.0f} prompt "
        f"and {demand.output_tokens:,.0f} output tokens on average, {demand.hit_rate:.0%} of prompts said before"
    )
    place = f"p{question.objectives.percentile:g}"
    columns = (
        "",
        "configuration",
        f"TTFT {place}",
        f"TPOT {place}",
        "met",
        "tokens/s",
        "hits",
        "sessions",
        "per task",
        "far prices",
    )
    print_table(columns, [(*table_row(i, v), far_text(v)) for i, v in enumerate(advice.verdicts, 1)])
    if advice.refused:
        print_table(
            ("does not serve this", "budget", "because"), [(r.what, r.budget, r.missing) for r in advice.refused]
        )
    if advice.split is not None:
        split = advice.split
        print(
            f"prompts and decodes apart ({split.what}): first token {seconds_text(split.ttft.seconds)}, per token "
            f"{seconds_text(split.tpot.seconds)}, by closed forms without queues; not simulated, not claimed"
        )
    if advice.best is not None:
        _print_best(advice, advice.best)
    for line in accuracy_lines(scores):
        print(line)


def table_row(rank: int, verdict: Verdict) -> tuple[str, ...]:
    """One configuration for a reader."""
    task = verdict.task_dollars
    cost = f"{verdict.task_gpu_seconds:,.1f} GPU s" if task is None else f"${task:,.4f}"
    return (
        str(rank), str(verdict.candidate), _span(verdict.ttft), _span(verdict.tpot), f"{verdict.attained:.0%}",
        f"{verdict.output_rate:,.0f}", f"{verdict.hit_rate:.1%}", f"{verdict.sessions:,}", cost,
    )  # fmt: skip


def _print_best(advice: Advice, best: Verdict) -> None:
    from thalweg.planner.platform import gib

    met = "meets the objectives" if not best.missed else "misses: " + "; ".join(best.missed)
    print(f"run: {best.candidate}; it {met}; limited by {best.bottleneck}")
    print(f"nearest shipped profile: thalweg serve --profile {advice.demand.profile}")
    print("memory of a rank: " + " + ".join(f"{name} {gib(size)}" for name, size in best.proof.items()))
    print(f"  = {gib(sum(best.proof.values()))} usable; its pools hold {best.token_capacity:,} tokens")
    print("rests on prices that are " + origins_text(best))
    for note in best.notes:
        print(f"note: {note}")
    if advice.sure is not None:
        print(f"the best that rests on nothing unclaimed: {advice.sure.candidate}, TTFT {_span(advice.sure.ttft)}")


def origins_text(verdict: Verdict) -> str:
    """How far prices are from measurements, by share of time."""
    return ", ".join(f"{share:.0%} {origin}" for origin, share in verdict.origins.items() if share > 0.0005)


def far_text(verdict: Verdict) -> str:
    """The share of a step's time whose price no measurement is near."""
    from thalweg.planner.cost import Origin

    return f"{verdict.origins[Origin.EXTRAPOLATED] + verdict.origins[Origin.BOUND]:.0%}"


def accuracy_lines(scores: Sequence[Score]) -> list[str]:
    """Measured errors of what the verdict rests on."""
    return [
        f"measured error, {s.layer} {s.slice}: median {s.median:.1%}, p90 {s.p90:.1%} of {s.count:,} held out; "
        f"80% intervals hold {s.coverage:.0%}"
        for s in scores
    ]


def _span(span: Span) -> str:
    return f"{seconds_text(span.value)} ({seconds_text(span.low)} - {seconds_text(span.high)})"


def seconds_text(value: float) -> str:
    """A time for a reader."""
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
