"""The kernel layer of the accuracy check: slices of the table left out of the fit, and what is then predicted."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from thalweg.errors import ConfigError
from thalweg.planner.accuracy import Regret, Score, Trial, regret, score
from thalweg.planner.baselines import constant_rate, kernel_roofline
from thalweg.planner.hardware import accelerator
from thalweg.planner.kernel_times import (
    LEAST_SECONDS,
    Finding,
    KernelTimes,
    layer_kind,
    row_kind,
    shape_of,
    shipped_kernel_times,
)
from thalweg.planner.tables import KernelRow, shipped_kernel_rows

SHORT_CONTEXT, LONG_CONTEXT = 65536, 131072
SLICES = (8192, 65536, 131072, 262144, 524288)  # contexts with rows on both sides
FOLDS = 5


def trials(fitted: Sequence[KernelRow], held_out: Iterable[KernelRow]) -> list[tuple[KernelRow, Trial]]:
    """Predictions of rows from others. Kinds that are not among those others are left out."""
    times, rate = KernelTimes(fitted), constant_rate(fitted)
    found = []
    for row in held_out:
        if row.seconds < LEAST_SECONDS or row_kind(row) not in times.kinds:
            continue
        baselines = {"roofline": kernel_roofline(row)}
        if constant := rate(row):
            baselines["constant rate"] = constant
        found.append((row, Trial(_name(row), row.seconds, times.row_estimate(row), baselines)))
    return found


def kernel_layer() -> tuple[list[Score], list[Regret]]:
    """Scores of the package's table: interpolated, extrapolated to 1M, and of devices left out."""
    rows = shipped_kernel_rows()
    inside = [pair for at in SLICES for pair in _held_out(rows, lambda row: row.context, at)]
    inside += [pair for fold in range(FOLDS) for pair in _held_out(rows, _fold, fold)]
    beyond = trials([r for r in rows if r.context <= SHORT_CONTEXT], [r for r in rows if r.context >= LONG_CONTEXT])
    devices = sorted({r.system for r in rows})
    elsewhere = [pair for name in devices for pair in _held_out(rows, lambda row: row.system, name)]
    scores = [
        *_scores("interpolated", inside),
        *_scores("extrapolated to 1M", beyond),
        *_scores("device left out", elsewhere),
    ]
    return scores, _regrets(inside)


def rows_layer(rows: Iterable[KernelRow]) -> tuple[list[Score], list[Finding]]:
    """Scores of other rows: predicted from the package's table; the long ones also from its short contexts alone. And
    which rows are not priced, by reason."""
    shipped = shipped_kernel_rows()
    reasons: dict[str, list[KernelRow]] = defaultdict(list)
    known = {_name(row) for row in shipped}
    for row in rows:
        reasons[_unpriced(row, known)].append(row)
    new = reasons.pop("", [])
    short = [row for row in shipped if row.context <= SHORT_CONTEXT]
    scores = [
        *_scores("given rows", trials(shipped, new)),
        *_scores("given rows, extrapolated to 1M", trials(short, [r for r in new if r.context >= LONG_CONTEXT])),
    ]
    return scores, [Finding(f"not priced: {reason}", tuple(found)) for reason, found in sorted(reasons.items())]


def _unpriced(row: KernelRow, known: set[str]) -> str:
    """Why a row is not compared; empty if it is."""
    if _name(row) in known:
        return "rows of the table itself"
    if row.seconds < LEAST_SECONDS:
        return "calls of less than a microsecond launch nothing"
    if row_kind(row) not in shipped_kernel_times().kinds:
        return f"no rows of {row_kind(row)}"
    try:
        accelerator(row.system)
        shape_of(row.model, layer_kind(row.kind))
    except ConfigError as error:
        return error.message
    return ""


def _held_out(
    rows: Sequence[KernelRow], part: Callable[[KernelRow], object], held: object
) -> list[tuple[KernelRow, Trial]]:
    """Predictions of the rows whose part is `held`, from all others."""
    return trials([r for r in rows if part(r) != held], [r for r in rows if part(r) == held])


def _fold(row: KernelRow) -> int:
    """One of `FOLDS` parts by the call, the same in all frameworks and on all devices."""
    call = (row.kind, row.model, row.tp, row.batch, row.new_tokens, row.context)
    return zlib.crc32(repr(call).encode()) % FOLDS


def _scores(slice_: str, pairs: Sequence[tuple[KernelRow, Trial]]) -> list[Score]:
    """Of all, then of every kind."""
    by_kind: dict[str, list[Trial]] = defaultdict(list)
    for row, trial in pairs:
        by_kind[f"{row_kind(row)}, {row.framework}"].append(trial)
    whole = [score("kernel", slice_, (trial for _, trial in pairs))]
    parts = [score("kernel", f"{slice_}: {kind}", found) for kind, found in sorted(by_kind.items())]
    return [s for s in (*whole, *parts) if s]


def _regrets(pairs: Sequence[tuple[KernelRow, Trial]]) -> list[Regret]:
    """Which framework is faster at a call; which chunk takes less time per token."""
    frameworks: dict[tuple, dict[str, tuple[float, float]]] = defaultdict(dict)
    chunks: dict[tuple, dict[int, tuple[float, float]]] = defaultdict(dict)
    for row, trial in pairs:
        predicted, measured = trial.estimate.seconds, trial.measured
        call = (row_kind(row), row.system, row.model, row.tp, row.batch, row.context)
        frameworks[(*call, row.new_tokens)][row.framework] = predicted, measured
        if "prefill" in row.kind:
            chunks[(*call, row.framework)][row.new_tokens] = predicted / row.new_tokens, measured / row.new_tokens
    found = [
        regret("framework of a layer", (list(options.values()) for options in frameworks.values())),
        regret("chunk size of a layer", (list(options.values()) for options in chunks.values())),
    ]
    return [r for r in found if r]


def _name(row: KernelRow) -> str:
    return (
        f"{row_kind(row)} {row.framework} {row.version} {row.system} {row.model} tp{row.tp} "
        f"b{row.batch} n{row.new_tokens} c{row.context}"
    )
