"""Times of V4 attention layers and their kernels on a framework and device: measured, interpolated or extrapolated.

One fit per kind of row (kernel_features.py gives the parts, fitting.py the method). Layers without compressed entries
have no rows: they are HCA layers with none. Odd data is kept apart and named (`findings`): rows that their neighbours
contradict, series that get faster with more context, and switches of a decode's path, which the fit follows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np

from thalweg.config.accelerators import Accelerator
from thalweg.config.model import LayerKind
from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError, nearest
from thalweg.planner.cost import Estimate, Origin
from thalweg.planner.fitting import APART, Array, GroupedFit, Key
from thalweg.planner.hardware import accelerator
from thalweg.planner.kernel_features import (
    AttentionShape,
    KernelQuery,
    decode_parts,
    entries,
    index_parts,
    prefill_parts,
)
from thalweg.planner.tables import KernelRow, shipped_kernel_rows

LEAST_SECONDS = 1e-6  # shorter calls are launches of nothing
DROP = 0.85  # a series that falls below this share with more context has switched its path
MODELS = ("flash", "pro")
MEASURED_WIDTH = 0.02  # log seconds, half: what a repeated measurement differs by
SLICE = 1.05  # a slice left out is so much harder to tell than one row, of which `Fit.surprise` speaks
# Half widths of 80% intervals away from the rows, in log seconds: beyond them, on another device of the framework, in
# another framework. 80% quantiles of held-out errors, as `thalweg plan check` holds them out.
FAR_WIDTHS = {
    "csa_prefill_module": (0.13, 0.22, 0.35),
    "hca_prefill_module": (0.035, 0.18, 0.34),
    "csa_decode_module": (0.10, 0.09, 0.52),
    "hca_decode_module": (0.08, 0.11, 0.15),
    "csa_indexer_logits_kernel": (0.13, 0.25, 0.36),
}
OTHER_FAR_WIDTHS = (0.35, 0.3, 0.5)
SCATTER = {"module": 0.012, "kernel": 0.03}  # relative, of a repeated measurement: kernels take microseconds
PARTS = {"prefill": prefill_parts, "decode": decode_parts}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something odd in the table, in words, and the rows it is about."""

    what: str
    rows: tuple[KernelRow, ...]


@cache
def shape_of(model: str, kind: LayerKind) -> AttentionShape:
    """The attention shape of a model that the tables name. Raises ConfigError for others."""
    if model not in MODELS:
        raise ConfigError(f"model: {model!r} has no rows.{nearest(model, MODELS)}", param="model")
    return AttentionShape.of(load_model_config(model), kind)


def layer_kind(kind: str) -> LayerKind:
    """The layer kind of a row's kind such as `csa_decode_module`."""
    try:
        return LayerKind(kind.split("_", 1)[0])
    except ValueError:
        raise ConfigError(f"kind: {kind!r} names no layer kind (csa, hca)", param="kind") from None


def path_switches(rows: Iterable[KernelRow]) -> dict[str, tuple[int, int]]:
    """By framework: the two contexts between which most CSA decode series fall, if there are such."""
    series: dict[tuple, list[KernelRow]] = defaultdict(list)
    for row in rows:
        if row.kind == "csa_decode_module":
            series[(row.framework, row.system, row.model, row.tp, row.batch)].append(row)
    votes: dict[tuple[str, int, int], list[bool]] = defaultdict(list)
    for (framework, *_), found in series.items():
        for left, right in pairwise(sorted(found, key=lambda r: r.context)):
            votes[(framework, left.context, right.context)].append(right.seconds < DROP * left.seconds)
    switches: dict[str, tuple[int, int]] = {}
    for (framework, low, high), cast in votes.items():
        if sum(cast) > len(cast) / 2:
            before = switches.get(framework, (low, high))
            switches[framework] = (max(low, before[0]), min(high, before[1]))
    return {framework: pair for framework, pair in switches.items() if pair[0] < pair[1]}


class KernelTimes:
    """Prices attention layers from a kernel table. Fits are made when first asked for; predictions are pure."""

    def __init__(self, rows: Sequence[KernelRow]) -> None:
        self._rows = [row for row in rows if row.seconds >= LEAST_SECONDS]
        self.switches = path_switches(self._rows)
        self._by_kind: dict[str, list[KernelRow]] = defaultdict(list)
        self._exact: dict[tuple, list[float]] = defaultdict(list)
        for row in self._rows:
            self._by_kind[row_kind(row)].append(row)
            self._exact[_identity(row)].append(row.seconds)
        self._fits: dict[str, GroupedFit] = {}
        self._known: dict[tuple[str, Key, AttentionShape], Array] = {}  # sizes of the rows of a key

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted(self._by_kind))

    def frameworks(self) -> tuple[str, ...]:
        """Frameworks that have rows."""
        return tuple(sorted({row.framework for row in self._rows}))

    def row_estimate(self, row: KernelRow) -> Estimate:
        """What the table says of a row's own call; the row need not be in it."""
        exact = self._exact.get(_identity(row))
        shape, query = shape_of(row.model, layer_kind(row.kind)), row_query(row)
        estimate = self.estimate(row_kind(row), (row.framework, row.system), shape, query)
        if exact is None:
            return estimate
        seconds = float(np.median(exact))
        width = math.exp(MEASURED_WIDTH)
        return Estimate(
            seconds, min(seconds / width, estimate.seconds), max(seconds * width, estimate.seconds), Origin.MEASURED
        )

    def estimate(self, kind: str, key: Key, shape: AttentionShape, query: KernelQuery) -> Estimate:
        """One call of a kind on (framework, device). Raises ConfigError for a kind without rows."""
        device = accelerator(key[1])
        query = self._on_path(key[0], kind, shape, query)
        seconds = self._seconds(kind, key, shape, query, device)
        origin = self._origin(kind, key, shape, query)
        width = math.exp(self._width(kind, key, origin))
        low, high = seconds / width, seconds * width
        for other in self._other_paths(key, kind, shape, query):
            beyond = self._seconds(kind, key, shape, other, device)
            low, high = min(low, beyond / width), max(high, beyond * width)
        return Estimate(seconds, low, high, origin)

    def floor(self, kind: str, key: Key, shape: AttentionShape, heads: float) -> float:
        """Seconds of a call that a second call in the same step does not add: launches and, in decodes, the weights."""
        fit = self._fit(kind).fit(key)
        device = accelerator(key[1])
        parts = call_parts(kind, shape, KernelQuery(1, 1, 1, heads), device)
        return float(
            parts[[0, 2, 3] if "decode" in kind else [0]] @ fit.coefficients[[0, 2, 3] if "decode" in kind else [0]]
        )

    def findings(self) -> tuple[Finding, ...]:
        """What is odd in the table."""
        found = []
        for framework, (low, high) in self.switches.items():
            found.append(
                Finding(f"{framework}: CSA decode takes another, faster path between {low:,} and {high:,} tokens", ())
            )
        for kind in self.kinds:
            grouped = self._fit(kind)
            rows = self._by_kind[kind]
            for key in sorted({(r.framework, r.system) for r in rows}):
                odd = grouped.fit(key).odd
                if odd:
                    what = f"{key[0]} on {key[1]}: {kind} differs from what its neighbours say"
                    found.append(Finding(what, tuple(rows[i] for i in odd)))
        return (*found, *_falling(self._rows, self.switches))

    def _fit(self, kind: str) -> GroupedFit:
        if kind not in self._fits:
            if kind not in self._by_kind:
                raise ConfigError(f"kind: no rows of {kind!r}.{nearest(kind, self._by_kind)}", param="kind")
            rows = self._by_kind[kind]
            calls = [(shape_of(r.model, layer_kind(r.kind)), self._row_query(r)) for r in rows]
            self._fits[kind] = GroupedFit(
                [(r.framework, r.system) for r in rows],
                np.array(
                    [call_parts(kind, s, q, accelerator(r.system)) for r, (s, q) in zip(rows, calls, strict=True)]
                ),
                np.array([_place(s, q) for s, q in calls]),
                np.array([r.seconds for r in rows]),
                SCATTER["module" if "module" in kind else "kernel"],
            )
        return self._fits[kind]

    def _seconds(self, kind: str, key: Key, shape: AttentionShape, query: KernelQuery, device: Accelerator) -> float:
        return self._fit(kind).fit(key).seconds(call_parts(kind, shape, query, device), _place(shape, query))

    def _row_query(self, row: KernelRow) -> KernelQuery:
        shape = shape_of(row.model, layer_kind(row.kind))
        return self._on_path(row.framework, row.kind, shape, row_query(row))

    def _on_path(self, framework: str, kind: str, shape: AttentionShape, query: KernelQuery) -> KernelQuery:
        if kind != "csa_decode_module" or entries(shape, query.deepest) <= shape.topk:
            return query
        low, high = self.switches.get(framework, (0, 0))
        return replace(query, path=2 if high and query.deepest > math.sqrt(low * high) else 1)

    def _other_paths(self, key: Key, kind: str, shape: AttentionShape, query: KernelQuery) -> tuple[KernelQuery, ...]:
        """Ways that a decode may take as well: between the contexts of a switch, and beyond the rows, nobody knows."""
        if kind != "csa_decode_module" or not query.path:
            return ()
        low, high = self.switches.get(key[0], (0, 0))
        deepest = max((self._by_kind[kind][i].context for i in self._fit(kind).rows(key)), default=0)
        unknown = low < query.deepest < high if high else query.deepest > deepest
        return (replace(query, path=3 - query.path),) if unknown else ()

    def _width(self, kind: str, key: Key, origin: Origin) -> float:
        beyond, elsewhere, foreign = FAR_WIDTHS.get(kind, OTHER_FAR_WIDTHS)
        if origin is Origin.BOUND:
            return elsewhere if self._fit(kind).has(key[:1]) else foreign
        near = max(MEASURED_WIDTH, SLICE * self._fit(kind).fit(key).surprise)
        return near if origin is Origin.INTERPOLATED else max(near, beyond)

    def _origin(self, kind: str, key: Key, shape: AttentionShape, query: KernelQuery) -> Origin:
        if not self._fit(kind).has(key):
            return Origin.BOUND
        if (kind, key, shape) not in self._known:
            rows = [self._by_kind[kind][i] for i in self._fit(kind).rows(key)]
            sizes = [_sizes(row_query(r)) for r in rows if shape_of(r.model, layer_kind(r.kind)) == shape]
            self._known[kind, key, shape] = np.array(sizes).reshape(-1, 4)
        known, size = self._known[kind, key, shape], np.array(_sizes(query))
        between = bool((known >= size).all(axis=1).any() and (known <= size).all(axis=1).any())
        return Origin.INTERPOLATED if between else Origin.EXTRAPOLATED


def row_query(row: KernelRow) -> KernelQuery:
    """The call that a row timed."""
    heads = shape_of(row.model, layer_kind(row.kind)).heads / row.tp
    return KernelQuery(row.batch, row.new_tokens, row.context, heads)


def row_kind(row: KernelRow) -> str:
    return f"{row.kind}:{row.variant}" if row.variant else row.kind


def _identity(row: KernelRow) -> tuple:
    call = (row.model, row.tp, row.batch, row.new_tokens, row.context)
    return (row_kind(row), row.framework, row.version, row.system, *call)


def call_parts(kind: str, shape: AttentionShape, query: KernelQuery, device: Accelerator) -> Array:
    for name, parts in PARTS.items():
        if f"_{name}_" in kind:
            return parts(shape, query, device)
    return index_parts(shape, query, device)


def _place(shape: AttentionShape, query: KernelQuery) -> Array:
    """Where residuals are compared: octaves of the sizes; models and paths stand apart."""
    return np.array(
        [
            math.log2(query.batch),
            math.log2(query.new_tokens),
            math.log2(query.context + 1024),
            math.log2(query.heads),
            APART * math.log2(shape.hidden / 4096) / math.log2(7 / 4),
            APART * query.path,
        ]
    )


def _sizes(query: KernelQuery) -> tuple[float, ...]:
    return query.batch, query.new_tokens, query.deepest, query.heads


def _falling(rows: Sequence[KernelRow], switches: dict[str, tuple[int, int]]) -> list[Finding]:
    """Series in which more context takes less time, beside the known switches."""
    series: dict[tuple, list[KernelRow]] = defaultdict(list)
    for row in rows:
        series[(row_kind(row), row.framework, row.system, row.model, row.tp, row.batch, row.new_tokens)].append(row)
    falls: dict[tuple, list[KernelRow]] = defaultdict(list)
    for found in series.values():
        for left, right in pairwise(sorted(found, key=lambda r: r.context)):
            known = switches.get(left.framework) == (left.context, right.context)
            if right.seconds < 0.92 * left.seconds and not (known and left.kind == "csa_decode_module"):
                falls[(row_kind(left), left.framework, left.context, right.context)] += [left, right]
    return [
        Finding(f"{framework}: {kind} is faster at {high:,} tokens than at {low:,}", tuple(found))
        for (kind, framework, low, high), found in sorted(falls.items(), key=lambda item: str(item[0]))
    ]


@cache
def shipped_kernel_times() -> KernelTimes:
    """The package's table."""
    return KernelTimes(shipped_kernel_rows())
