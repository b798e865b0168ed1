"""What others have published about kernels that do the same work, to hold ours beside. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources

from thalweg.kernels.cases.serving import CHUNK, CONTEXTS, STEPS

_SYSTEMS = {"H100": "h100_sxm", "H200": "h200_sxm", "B200": "b200_sxm", "GB200": "gb200", "B300": "b300_sxm"}
_NEAR = 0.1  # of a context's length: tables have their own grid


def published(op: str, shape: str, device: str) -> list[str]:
    """Figures for an op's shape of cases/serving.py on a device: times of the same shape, else shares of peaks."""
    step = next(name for name in STEPS if shape.startswith(name))
    context = CONTEXTS.get(shape.rpartition(" at ")[2])
    if op == "index_topk" and context is not None and (times := _index_scores(step, context, device)):
        return times
    kind = step.split()[0]
    return [f"{row['what']} ({row['device']}, {row['source']})" for row in _figures() if _same(row, op, kind)]


def _same(row: Mapping[str, str], op: str, kind: str) -> bool:
    return (row["op"], row["step"]) == (op, kind)


def _index_scores(step: str, context: int, device: str) -> list[str]:
    count = STEPS[step]
    batch, new, past = (1, CHUNK, context - CHUNK) if count == CHUNK else (count, 1, context - 1)
    found = []
    for row in _rows("planner", "v4_kernel_times.csv"):
        same = row["system"] == _SYSTEMS.get(device) and row["kind"] == "csa_indexer_logits_kernel"
        if same and (int(row["batch"]), int(row["new_tokens"])) == (batch, new):
            length, microseconds = int(row["context"]), float(row["latency_ms"]) * 1e3
            if abs(length - past) <= _NEAR * context:
                found.append(
                    f"{row['framework']} {row['version']}, FP8 scores alone: {microseconds:,.1f} us at {length:,}"
                )
    return found


def _figures() -> list[dict[str, str]]:
    return _rows("published_kernels.csv")


@cache
def _rows(*path: str) -> list[dict[str, str]]:
    text = resources.files("thalweg").joinpath("data", *path).read_text()
    return list(csv.DictReader(text.splitlines()))
