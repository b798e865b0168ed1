"""Times of everything in a step beside attention: experts, hyper-connections, GEMMs, collectives. From tables where a
device and framework have rows; where they have none, from what others reach of the hardware's limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from thalweg.config.accelerators import Accelerator
from thalweg.planner.cost import NOTHING, Estimate, Origin
from thalweg.planner.fitting import APART, Array, GroupedFit, Key
from thalweg.planner.hardware import accelerator, link
from thalweg.planner.kernel_features import LAUNCH
from thalweg.planner.tables import OpRow, shipped_op_rows

WEIGHT_BYTES = {"mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16, "fp8": 1.0, "bf16": 2.0}
WIDTHS = {Origin.INTERPOLATED: 0.12, Origin.EXTRAPOLATED: 0.25, Origin.BOUND: 0.35}  # log, as in kernel_times
SCATTER = 0.02  # relative, of a repeated measurement
HOST_BOUND = 4.0  # a group whose fastest call is so many times the usual fastest has timed its dispatch


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One layer's routed experts."""

    hidden: int
    inner: int
    experts: int
    per_token: int


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call: `tokens`, or `bytes` of a collective's message; `tp` ranks share each expert, `ep` all of them."""

    tokens: float
    tp: int = 1
    ep: int = 1
    bytes: float = 0.0
    shape: ExpertShape | tuple[int, int] | None = None  # experts, or (hidden, outputs)


Parts = Callable[[OpCall, str, Accelerator], list[float]]


def expert_parts(call: OpCall, quant: str, device: Accelerator) -> list[float]:
    """Ideal seconds of one layer's experts on a rank: launch, weights read, arithmetic, rows of tokens, passes."""
    shape = call.shape
    assert isinstance(shape, ExpertShape)
    local = shape.experts / call.ep
    pairs = call.tokens * shape.per_token / call.ep
    reached = local * -math.expm1(-pairs / local)
    matrices = 3 * shape.hidden * shape.inner / call.tp
    peak = {"mxfp4": device.fp8, "nvfp4": device.fp4 or device.fp8, "fp8": device.fp8}.get(quant, device.bf16)
    return [
        LAUNCH,
        reached * matrices * WEIGHT_BYTES[quant] / device.bandwidth,
        2 * pairs * matrices / peak,
        2 * pairs * (shape.hidden + shape.inner / call.tp) / device.bandwidth,
        LAUNCH * math.log2(1 + pairs / local),
        2 * call.tokens * shape.hidden * 2 / device.bandwidth,
    ]


def mix_parts(call: OpCall, quant: str, device: Accelerator) -> list[float]:
    """Ideal seconds of a layer's hyper-connections: launch, and the streams read or written."""
    assert isinstance(call.shape, tuple)
    return [LAUNCH, 10 * call.tokens * call.shape[0] * 2 / device.bandwidth]


def gemm_parts(call: OpCall, quant: str, device: Accelerator) -> list[float]:
    """Ideal seconds of x w^T: launch, weights, arithmetic, rows."""
    assert isinstance(call.shape, tuple)
    width, outputs = call.shape
    peak = device.fp8 if quant == "fp8" else device.bf16
    return [
        LAUNCH,
        width * outputs * WEIGHT_BYTES[quant] / device.bandwidth,
        2 * call.tokens * width * outputs / peak,
        call.tokens * (width * WEIGHT_BYTES[quant] + 2 * outputs) / device.bandwidth,
    ]


def collective_parts(call: OpCall, quant: str, device: Accelerator) -> list[float]:
    """Ideal seconds of a collective of `tp` ranks: launch, steps, bytes over the link."""
    share = (call.tp - 1) / call.tp
    return [LAUNCH, LAUNCH * math.log2(call.tp), call.bytes * share / link(device, call.tp)]


def exchange_parts(call: OpCall, quant: str, device: Accelerator) -> list[float]:
    """Ideal seconds of sending a rank's tokens to their experts, or back: launch, bytes over the link."""
    assert isinstance(call.shape, ExpertShape)
    ranks = call.ep * -math.expm1(-call.shape.per_token / call.ep)  # that a token's experts are on, about
    return [LAUNCH, call.tokens * ranks * call.shape.hidden * 2 / link(device, call.ep)]


PARTS: dict[str, Parts] = {
    "moe": expert_parts,
    "mhc_pre": mix_parts,
    "mhc_post": mix_parts,
    "gemm": gemm_parts,
    "all_reduce": collective_parts,
    "all_gather": collective_parts,
    "reduce_scatter": collective_parts,
    "deepep_ll_dispatch": exchange_parts,
    "deepep_ll_combine": exchange_parts,
    "deepep_ht_dispatch": exchange_parts,
    "deepep_ht_combine": exchange_parts,
}
SHAPES = {"flash": ExpertShape(4096, 2048, 256, 6), "pro": ExpertShape(7168, 3072, 384, 6)}


def op_call(row: OpRow) -> OpCall:
    shape: ExpertShape | tuple[int, int] | None = SHAPES.get(row.model)
    if row.kind.startswith("gemm_"):
        outputs, width = (int(n) for n in row.kind.removeprefix("gemm_").split("x"))
        shape = (width, outputs)
    elif row.kind.startswith("mhc"):
        shape = (SHAPES[row.model].hidden, 0)
    return OpCall(row.tokens, row.tp, row.ep, row.bytes, shape)


def op_kind(row: OpRow) -> str:
    return "gemm" if row.kind.startswith("gemm_") else row.kind


def _place(call: OpCall) -> Array:
    shape = call.shape
    apart = math.log2(shape.hidden) if isinstance(shape, ExpertShape) else sum(math.log2(1 + n) for n in shape or ())
    sizes = (call.tokens, call.tp, call.ep, call.bytes)
    return np.array([*(math.log2(max(1.0, n)) for n in sizes), APART * apart])


def dispatch_bound(rows: Sequence[OpRow]) -> frozenset[tuple[str, Key]]:
    """(kind, key) of rows that timed the host, not the kernel: even the fastest takes far longer than elsewhere."""
    fastest: dict[str, dict[Key, float]] = {}
    for row in rows:
        of_kind = fastest.setdefault(op_kind(row), {})
        key = (row.framework, row.system, row.quant)
        of_kind[key] = min(row.seconds, of_kind.get(key, math.inf))
    return frozenset(
        (kind, key)
        for kind, of_kind in fastest.items()
        for key, seconds in of_kind.items()
        if seconds > HOST_BOUND * float(np.median(list(of_kind.values())))
    )


class OpTimes:
    """Prices ops from a table; fits are made when first asked for. `dropped` are groups of rows that time the host."""

    def __init__(self, rows: Sequence[OpRow]) -> None:
        self.dropped = dispatch_bound(rows)
        self._rows: dict[str, list[OpRow]] = {}
        for row in rows:
            if (op_kind(row), (row.framework, row.system, row.quant)) not in self.dropped:
                self._rows.setdefault(op_kind(row), []).append(row)
        self._fits: dict[str, GroupedFit] = {}
        self._spans: dict[tuple[str, Key], tuple[Array, Array]] = {}

    def estimate(self, kind: str, key: Key, call: OpCall) -> Estimate:
        """One call of a kind on (framework, device, quant)."""
        if not call.tokens and not call.bytes:
            return NOTHING
        grouped = self._fit(kind)
        device, quant = accelerator(key[1]), key[2]
        seconds = grouped.fit(key).seconds(np.array(PARTS[kind](call, quant, device)), _place(call))
        origin = self._origin(kind, key, call)
        width = math.exp(WIDTHS[origin])
        return Estimate(seconds, seconds / width, seconds * width, origin)

    def _fit(self, kind: str) -> GroupedFit:
        if kind not in self._fits:
            rows = self._rows[kind]
            calls = [op_call(r) for r in rows]
            self._fits[kind] = GroupedFit(
                [(r.framework, r.system, r.quant) for r in rows],
                np.array([PARTS[kind](c, r.quant, accelerator(r.system)) for r, c in zip(rows, calls, strict=True)]),
                np.array([_place(c) for c in calls]),
                np.array([r.seconds for r in rows]),
                SCATTER,
            )
        return self._fits[kind]

    def _origin(self, kind: str, key: Key, call: OpCall) -> Origin:
        rows = self._fit(kind).rows(key)
        if not rows:
            return Origin.BOUND
        if (kind, key) not in self._spans:
            sizes = np.array([_place(op_call(self._rows[kind][i]))[:4] for i in rows])
            self._spans[(kind, key)] = sizes.min(axis=0), sizes.max(axis=0)
        low, high = self._spans[(kind, key)]
        size = _place(call)[:4]
        inside = bool(np.all(size >= low - 1e-9) and np.all(size <= high + 1e-9))
        return Origin.INTERPOLATED if inside else Origin.EXTRAPOLATED


@cache
def shipped_op_times() -> OpTimes:
    """The package's table."""
    return OpTimes(shipped_op_rows())
