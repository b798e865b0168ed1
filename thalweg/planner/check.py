"""The accuracy check as a whole: the package's own tables, or rows that a user brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from thalweg.errors import ConfigError
from thalweg.planner.accuracy import Regret, Report, Score, Trial, regret, score
from thalweg.planner.accuracy_kernels import kernel_layer, rows_layer
from thalweg.planner.accuracy_ops import op_layer
from thalweg.planner.accuracy_steps import step_layer
from thalweg.planner.kernel_times import Finding, shipped_kernel_times
from thalweg.planner.op_times import shipped_op_times
from thalweg.planner.serving_rows import Comparison, compare
from thalweg.planner.tables import KERNEL_COLUMNS, SERVING_COLUMNS, kernel_rows, read_file, read_rows


def check(rows: Path | None = None) -> Report:
    """Errors of the package's tables, or of the rows of a file with the columns of the kernel or the serving table.

    Raises ConfigError for a file that is neither, or that has nothing to compare.
    """
    if rows is None:
        scores, regrets = kernel_layer()
        comparisons = compare(read_rows("v4_measured_serving.csv"))
        scores += op_layer()
        scores += step_layer()
        scores += _serving_scores(comparisons)
        regrets += _layout_regret(comparisons)
        return Report(tuple(scores), tuple(regrets), tuple(comparisons), _findings())
    found, kernel = _given(rows)
    if kernel:
        scores, findings = rows_layer(kernel_rows(found, rows.name))
        if not scores:
            reasons = "; ".join(f.what for f in findings)
            raise ConfigError(f"rows: nothing in {rows} can be compared: {reasons}", param="rows")
        return Report(tuple(scores), findings=tuple(findings))
    comparisons = compare(found)
    return Report(tuple(_serving_scores(comparisons)), comparisons=tuple(comparisons))


def _findings() -> tuple[Finding, ...]:
    """What is odd in the package's tables."""
    host = [
        Finding(f"{framework} on {device}: {quant} {kind} rows time the host's dispatch and are left out", ())
        for kind, (framework, device, quant) in sorted(shipped_op_times().dropped)
    ]
    return (*shipped_kernel_times().findings(), *host)


def _given(path: Path) -> tuple[list[dict[str, str]], bool]:
    """Rows of a file, and whether they are kernel rows."""
    try:
        return read_file(path, KERNEL_COLUMNS), True
    except ConfigError as kernel_error:
        try:
            return read_file(path, SERVING_COLUMNS), False
        except ConfigError as error:
            lacking = min((kernel_error, error), key=lambda e: e.message.count(","))
            raise lacking from None


def _serving_scores(comparisons: Sequence[Comparison]) -> list[Score]:
    """Of claimed times and of claimed capacities, as a whole and by quantity."""
    times = [c for c in comparisons if c.claimed and c.unit == "s"]
    capacities = [c for c in comparisons if c.claimed and c.unit != "s"]
    scores = [score("serving", "claimed", _trials(times))]
    scores += [
        score("serving", f"claimed: {quantity}", _trials(c for c in times if c.quantity == quantity))
        for quantity in sorted({c.quantity for c in times})
    ]
    scores.append(score("memory", "claimed", _trials(capacities)))
    return [s for s in scores if s]


def _layout_regret(comparisons: Sequence[Comparison]) -> list[Regret]:
    """Which of the configurations that were measured under one load gives the first token soonest."""
    loads: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for c in comparisons:
        if c.claimed and c.quantity == "ttft" and c.estimate:
            loads[c.load].append((c.estimate.seconds, c.measured))
    found = regret("configuration of a load, by first-token time", loads.values())
    return [found] if found else []


def _trials(comparisons: Iterable[Comparison]) -> list[Trial]:
    return [Trial(c.where, c.measured, c.estimate, c.baselines) for c in comparisons if c.estimate]
