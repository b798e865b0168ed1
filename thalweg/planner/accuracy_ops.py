"""The op layer of the accuracy check: fifths of the table of experts, hyper-connections, GEMMs and links left out."""

from __future__ import annotations

import zlib
from collections import defaultdict

import numpy as np

from thalweg.planner.accuracy import Score, Trial, score
from thalweg.planner.accuracy_kernels import FOLDS
from thalweg.planner.hardware import accelerator
from thalweg.planner.kernel_features import LAUNCH
from thalweg.planner.op_times import PARTS, OpTimes, op_call, op_kind, shipped_op_times
from thalweg.planner.tables import OpRow, shipped_op_rows


def op_layer() -> list[Score]:
    """Scores of all ops, then of every kind and framework. Rows that timed the host are left out."""
    dropped = shipped_op_times().dropped
    rows = [r for r in shipped_op_rows() if (op_kind(r), (r.framework, r.system, r.quant)) not in dropped]
    by_kind: dict[str, list[Trial]] = defaultdict(list)
    for fold in range(FOLDS):
        times = OpTimes([r for r in rows if _fold(r) != fold])
        for row in rows:
            if _fold(row) == fold:
                by_kind[f"interpolated: {op_kind(row)}, {row.framework}"].append(_trial(times, row))
    every = score("ops", "interpolated", (trial for found in by_kind.values() for trial in found))
    return [s for s in (every, *(score("ops", name, found) for name, found in sorted(by_kind.items()))) if s]


def _trial(times: OpTimes, row: OpRow) -> Trial:
    call = op_call(row)
    parts = np.array(PARTS[op_kind(row)](call, row.quant, accelerator(row.system)))
    roofline = {"roofline": float(np.sum(parts[parts != LAUNCH]))}
    return Trial(
        row.kind, row.seconds, times.estimate(op_kind(row), (row.framework, row.system, row.quant), call), roofline
    )


def _fold(row: OpRow) -> int:
    call = (row.kind, row.model, row.quant, row.tp, row.ep, row.tokens, row.bytes)
    return zlib.crc32(repr(call).encode()) % FOLDS
