"""What the planner is compared with: limits of the hardware alone, and rates that do not depend on the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from thalweg.planner.cost import Estimate, Origin, StepWork
from thalweg.planner.fitting import Array, Key
from thalweg.planner.hardware import accelerator
from thalweg.planner.kernel_features import LAUNCH, AttentionShape, KernelQuery
from thalweg.planner.kernel_times import call_parts, layer_kind, row_kind, row_query, shape_of
from thalweg.planner.op_times import PARTS, OpCall
from thalweg.planner.serving import Serving
from thalweg.planner.step_cost import Tables
from thalweg.planner.tables import KernelRow


def kernel_roofline(row: KernelRow) -> float:
    """Ideal seconds of a call: its arithmetic and bytes at the hardware's peaks, no launches."""
    shape = shape_of(row.model, layer_kind(row.kind))
    return _bound(call_parts(row_kind(row), shape, row_query(row), accelerator(row.system))).seconds


def constant_rate(rows: Sequence[KernelRow]) -> Callable[[KernelRow], float | None]:
    """The time of the same call at the nearest context among rows, whatever the context asked for."""
    known: dict[tuple, dict[int, float]] = {}
    for row in rows:
        known.setdefault(_call(row), {})[row.context] = row.seconds

    def at(row: KernelRow) -> float | None:
        contexts = known.get(_call(row))
        if not contexts:
            return None
        return contexts[min(contexts, key=lambda c: abs(c - row.context))]

    return at


def _call(row: KernelRow) -> tuple:
    return row_kind(row), row.framework, row.system, row.model, row.tp, row.batch, row.new_tokens


class RooflineKernels:
    """Attention layers at the hardware's peaks."""

    def estimate(self, kind: str, key: Key, shape: AttentionShape, query: KernelQuery) -> Estimate:
        """Ideal seconds of a call."""
        return _bound(call_parts(kind, shape, query, accelerator(key[1])))

    def floor(self, kind: str, key: Key, shape: AttentionShape, heads: float) -> float:
        """Nothing is launched."""
        return 0.0


class RooflineOps:
    """Other ops at the hardware's peaks."""

    def estimate(self, kind: str, key: Key, call: OpCall) -> Estimate:
        """Ideal seconds of a call."""
        return _bound(np.array(PARTS[kind](call, key[2], accelerator(key[1]))))


def _bound(parts: Array) -> Estimate:
    seconds = float(np.sum(parts[parts != LAUNCH]))
    return Estimate(seconds, seconds, seconds, Origin.BOUND)


def roofline_tables() -> Tables:
    """Prices of the hardware's limits alone."""
    return Tables(RooflineKernels(), RooflineOps())


def constant_figure(serving: Serving, quantity: str, prompts: int, prompt_tokens: int) -> float:
    """Seconds of a quantity at the rates of a first chunk and of one decode at 1K of context."""
    if quantity == "tpot":
        return serving.decode_step(1, 1024).seconds / serving.tokens_per_step()
    deployment = serving.cost.deployment
    each = math.ceil(prompts / deployment.layout.dp)
    chunk = serving.cost.estimate(StepWork.prefill(deployment.chunk_tokens)).seconds / deployment.chunk_tokens
    return prompt_tokens * chunk * (each if quantity == "makespan" else (each + 1) / 2)
