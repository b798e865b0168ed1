"""`thalweg plan check`: errors of the planner on measurements that it did not see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from thalweg.planner.accuracy import Report, Score
    from thalweg.planner.serving_rows import Comparison


def check(
    rows: Annotated[
        Path | None, typer.Option(help="A CSV of your own, with the columns of the kernel or the serving table.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every slice, figure and finding, not the sums alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Print median and p90 error, bias, interval coverage and regret by layer, beside two baselines.

    Layers are never pooled. Figures that the planner does not claim are listed with the reason.
    """
    from thalweg.planner.check import check as run_check

    report = run_check(rows)
    if as_json:
        print(json.dumps(report.plain(), indent=2))
    else:
        _print(report, every=every)


def _print(report: Report, *, every: bool) -> None:
    from thalweg.cli.progress import print_table

    columns = ("layer", "slice", "n", "median", "p90", "bias", "80% holds", "roofline", "constant rate")
    print_table(columns, [_score_row(s) for s in report.scores if every or ":" not in s.slice])
    if report.regrets:
        print_table(
            ("choice", "n", "right", "mean loss", "p90 loss"),
            [(r.choice, f"{r.count:,}", f"{r.right:.0%}", f"{r.mean:.1%}", f"{r.p90:.1%}") for r in report.regrets],
        )
    claimed = [c for c in report.comparisons if c.claimed]
    if claimed:
        print_table(("claimed figure", "measured", "predicted", "error", "80% interval"), [_row(c) for c in claimed])
    others = [c for c in report.comparisons if not c.claimed]
    if others and every:
        print_table(
            ("not claimed", "measured", "predicted", "error", "80% interval", "because"),
            [(*_row(c), c.reason) for c in others],
        )
    elif others:
        print(f"{len(others)} figures are not claimed; --all lists them with the reasons")
    if report.findings:
        print("oddities:" if every else f"{len(report.findings)} oddities in the rows; --all lists them")
    for finding in report.findings if every else ():
        print(f"  {finding.what}" + (f" ({len(finding.rows)} rows)" if finding.rows else ""))


def _score_row(score: Score) -> tuple[str, ...]:
    baselines = (score.baselines.get(name) for name in ("roofline", "constant rate"))
    return (
        score.layer,
        score.slice,
        f"{score.count:,}",
        f"{score.median:.1%}",
        f"{score.p90:.1%}",
        f"{score.bias:+.1%}",
        f"{score.coverage:.0%}",
        *("" if error is None else f"{error:.0%}" for error in baselines),
    )


def _row(comparison: Comparison) -> tuple[str, ...]:
    name, measured = f"{comparison.quantity} {comparison.where}", _figure(comparison.measured, comparison.unit)
    estimate = comparison.estimate
    if estimate is None:
        return name, measured, "", "", ""
    error = f"{estimate.seconds / comparison.measured - 1:+.1%}"
    interval = f"{_figure(estimate.low, comparison.unit)} - {_figure(estimate.high, comparison.unit)}"
    return name, measured, _figure(estimate.seconds, comparison.unit), error, interval


def _figure(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value / 1e6:,.2f}M {unit}"
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1e3:,.3g} ms"
