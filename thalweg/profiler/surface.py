"""A time as a function of two coordinates, from cells measured on a grid; every value says how it was come by.

Cells form rows: curves over the context length x, one per value of y (the share of a prompt that is reused, or the size
of a batch). Within a row medians are made monotone and interpolated by PCHIP in logarithms (no overshoot); between rows
by PCHIP over y itself, because time is nearly linear in the tokens that are computed, and in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression, nnls

from thalweg.errors import ConfigError

FAR = 2.0  # extrapolated up to so many times the last cell; only bounds beyond
_SAME = 0.01  # contexts that differ relatively by less are the same
_SAME_ROW = 1e-3
_COLUMN = 1.6  # contexts within this ratio are meant to be the same


class Tag(StrEnum):
    """How a value was come by, the surest first."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    BOUND = "bound"


_ORDER = {tag: place for place, tag in enumerate(Tag)}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, and the range of four of five single samples. `high` None: there is no upper bound.

    A `bound` claims only that the truth is not on the other side: beyond the longest context it is at least `value`,
    below the shortest at most.
    """

    value: float
    low: float
    high: float | None
    tag: Tag


@dataclass(frozen=True, slots=True)
class Point:
    """A value of the surface at context x and row y."""

    x: float
    y: float
    estimate: Estimate


Cell = tuple[float, float, float, float, float, float]  # row, x, y, median, low, high


class _Curve:
    """One row: time over context."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        _, x, y, median, low, high = (np.array(column, np.float64) for column in zip(*sorted(cells), strict=True))
        self.x, self._y = x, y
        self._logs = isotonic_regression(np.log(median)).x
        self._ratios = np.log(low / median), np.log(high / median)
        # For what lies outside: overhead, cost per token and per pair of tokens, none negative; relative errors count.
        powers = np.stack([np.ones_like(x), x / x[-1], (x / x[-1]) ** 2], axis=1)
        self._polynomial = nnls(powers / median[:, None], np.ones_like(x))[0]

    def y_at(self, x: float) -> float:
        """The y that was really measured near x."""
        return float(np.interp(np.log(x), np.log(self.x), self._y))

    def at(self, x: float) -> Estimate:
        first, last = self.x[0], self.x[-1]
        within = float(np.clip(x, first, last))
        value = self._inside(within)
        low, high = (float(value * np.exp(np.interp(np.log(within), np.log(self.x), r))) for r in self._ratios)
        if first * (1 - _SAME) <= x <= last * (1 + _SAME):
            known = bool(np.any(np.abs(self.x / x - 1) < _SAME))
            return Estimate(value, low, high, Tag.MEASURED if known else Tag.INTERPOLATED)
        scaled = value * self._shape(x) / self._shape(within)
        if x > last:
            if x > FAR * last:
                return Estimate(value + self._slope(last, value) * (x - last), low, None, Tag.BOUND)
            # A token costs no less at depth, and at most in proportion to the depth.
            return Estimate(scaled, low, high * float(x / last) ** 2, Tag.EXTRAPOLATED)
        if x < first / FAR:
            return Estimate(value, 0.0, high, Tag.BOUND)
        return Estimate(scaled, low * float(x / first), high, Tag.EXTRAPOLATED)

    def _inside(self, x: float) -> float:
        if len(self.x) == 1:
            return float(np.exp(self._logs[0]))
        return float(np.exp(PchipInterpolator(np.log(self.x), self._logs)(np.log(x))))

    def _shape(self, x: float) -> float:
        a, b, c = self._polynomial
        scaled = x / self.x[-1]
        return float(a + b * scaled + c * scaled**2)

    def _slope(self, x: float, value: float) -> float:
        """Time per token at x, where the curve has `value`."""
        _, b, c = self._polynomial
        return float((b + 2 * c * x / self.x[-1]) / self.x[-1]) * value / self._shape(x)


class Surface:
    """Cells and what they imply. `rises`: time grows with y; else it falls."""

    def __init__(self, cells: Sequence[Cell], *, rises: bool) -> None:
        rows: dict[float, list[Cell]] = {}
        for cell in cells:
            rows.setdefault(cell[0], []).append(cell)
        self._rows = {row: _Curve(rows[row]) for row in sorted(rows)}
        self._rises = rises

    def at(self, x: float, y: float) -> Estimate:
        """The time at context x and y. Raises ConfigError without cells, or for coordinates that do not exist."""
        if not self._rows:
            raise ConfigError("the profile has no cell of this kind", param="profile")
        if not x > 0:
            raise ConfigError(f"context: {x} is not above 0", param="context")
        curves = list(self._rows.values())
        places = np.array([curve.y_at(x) for curve in curves])
        known = [curve.at(x) for curve in curves]
        order = np.argsort(places, kind="stable")
        places, known = places[order], self._monotone([known[i] for i in order])
        same = np.flatnonzero(np.abs(places - y) <= _SAME_ROW)
        if len(same):
            return known[int(same[0])]
        if places[0] < y < places[-1]:
            around = int(np.searchsorted(places, y))
            tag = _least_sure(Tag.INTERPOLATED, known[around - 1].tag, known[around].tag)
            return self._between(places, known, y, tag)
        return self._outside(places, known, y)

    def table(self, longest: float | None) -> list[Point]:
        """All cells, the points of the grid that have none, and two lengths beyond it, up to `longest`."""
        grid: list[dict[float, float]] = []  # contexts by row of one column, which differ by some tokens
        for x, row in sorted((float(x), row) for row, curve in self._rows.items() for x in curve.x):
            if not grid or row in grid[-1] or x > min(grid[-1].values()) * _COLUMN:
                grid.append({})
            grid[-1][row] = x
        last = max(grid[-1].values()) if grid else 0.0
        beyond = [x for x in (FAR * last, 2 * FAR * last) if last and (longest is None or x <= longest)]
        points = []
        for row, curve in self._rows.items():
            own = [column.get(row, min(column.values())) for column in grid]
            points += [Point(x, row, curve.at(x)) for x in own + beyond]
        return points

    def _between(self, places: np.ndarray, known: list[Estimate], y: float, tag: Tag) -> Estimate:
        value, low = (self._over_rows(places, [getattr(k, name) for k in known], y) for name in ("value", "low"))
        highs = [k.high for k in known]
        high = None if any(h is None for h in highs) else self._over_rows(places, [h or 0.0 for h in highs], y)
        return Estimate(value, low, high, tag)

    def _over_rows(self, places: np.ndarray, values: list[float], y: float) -> float:
        distinct, first = np.unique(places, return_index=True)
        return float(PchipInterpolator(distinct, np.array(values)[first])(y))

    def _monotone(self, known: list[Estimate]) -> list[Estimate]:
        """The rows at one context, with noise that goes against the order pooled."""
        values = np.exp(isotonic_regression([np.log(k.value) for k in known], increasing=self._rises).x)
        return [
            Estimate(v, k.low * v / k.value, None if k.high is None else k.high * v / k.value, k.tag)
            for k, v in zip(known, map(float, values), strict=True)
        ]

    def _outside(self, places: np.ndarray, known: list[Estimate], y: float) -> Estimate:
        """Beyond the first or last row. Only batches lie there: shares end at 0 and 1, where rows are measured."""
        edge = known[-1] if y > places[-1] else known[0]
        if not self._rises or y < places[0] or len(known) == 1:
            return Estimate(edge.value, 0.0 if y > places[-1] or self._rises else edge.low, edge.high, Tag.BOUND)
        slope = max(0.0, (edge.value - known[-2].value) / (places[-1] - places[-2]))
        value = edge.value + slope * (y - places[-1])
        if y > FAR * places[-1] or edge.high is None:
            return Estimate(edge.value, edge.low, None, Tag.BOUND)
        high = edge.high * y / places[-1]
        return Estimate(value, edge.low, float(high), _least_sure(Tag.EXTRAPOLATED, edge.tag))


def _least_sure(*tags: Tag) -> Tag:
    """What a value made of these is."""
    return max(tags, key=_ORDER.__getitem__)
