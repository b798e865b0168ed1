"""Fits of measured times: a physical form with nonnegative coefficients, and a smooth correction where rows are near.

Physical: time = sum of coefficient * ideal seconds of a part (bytes over bandwidth, FLOPs over peak, launches), with
the relative error least. Coefficients are dimensionless (one over an efficiency), so they carry over: those of a device
are drawn towards those of its framework, and these towards those of all. What a device's rows never saw, a longer
context or another number of heads, is priced by what the others saw.
Correction: log residuals smoothed by a Gaussian process over the logarithms of the sizes. It fades to nothing away from
the rows, so beyond them the physical form decides alone. A row that its neighbours contradict is kept out and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
Key = tuple[str, ...]

SHARED_WEIGHT = 0.5  # of the coefficients one level up, in rows per coefficient: best for the kernel layer
OCTAVES = 2.5  # over so many doublings of a size residuals are alike
APART = 12.5  # octaves between places that share no residual
ODD_NOISES = 10  # a row so many times the noise away from what its neighbours say is kept out of the fit


@dataclass(frozen=True)
class Smooth:
    """A correction of log times: zero far from its rows."""

    places: Array  # rows x coordinates, in octaves
    weights: Array
    variance: float

    def at(self, place: Array) -> float:
        """The correction at one place."""
        if self.variance == 0.0:
            return 0.0
        return float(self.variance * _alike(place[None, :], self.places)[0] @ self.weights)


def smooth(places: Array, residuals: Array, noise: float) -> tuple[Smooth, Array]:
    """The correction, and how far each row is from what the other rows say of its place."""
    variance = float(np.mean(residuals**2))
    if variance == 0.0:
        return Smooth(places, np.zeros(len(residuals)), 0.0), residuals
    inverse = np.linalg.inv(variance * _alike(places, places) + noise**2 * np.eye(len(places)))
    weights = inverse @ residuals
    return Smooth(places, weights, variance), weights / np.diag(inverse)


def _alike(left: Array, right: Array) -> Array:
    distance = np.sum(((left[:, None, :] - right[None, :, :]) / OCTAVES) ** 2, axis=2)
    return np.exp(-0.5 * distance)


@dataclass(frozen=True)
class Fit:
    """Of one key: coefficients, the correction of its rows if they are this key's own, the rows kept out, and how far
    (log) a row usually is from what the others say of it, the 80% quantile."""

    coefficients: Array
    correction: Smooth | None
    odd: tuple[int, ...]
    surprise: float

    def seconds(self, features: Array, place: Array) -> float:
        """The time of one call."""
        seconds = float(features @ self.coefficients)
        return seconds * float(np.exp(self.correction.at(place))) if self.correction else seconds


class GroupedFit:
    """Fits of a table by key, such as (framework, device): made when first asked for, then kept.

    `features`: rows x parts, ideal seconds; `places`: rows x sizes, in octaves; `seconds`: measured, with a relative
    scatter of `noise`.
    """

    def __init__(self, keys: Sequence[Key], features: Array, places: Array, seconds: Array, noise: float) -> None:
        self._noise = noise
        self._keys, self._features, self._places, self._seconds = keys, features, places, seconds
        self._rows: dict[Key, list[int]] = {}
        for index, key in enumerate(keys):
            for depth in range(len(key) + 1):
                self._rows.setdefault(key[:depth], []).append(index)
        scaled = features / seconds[:, None]
        self._usual = np.sqrt(np.mean(scaled**2, axis=0))  # what one unit of each coefficient explains
        self._fits: dict[Key, Fit] = {}
        self._coefficients: dict[Key, Array] = {}

    def has(self, key: Key) -> bool:
        """True if there are rows of exactly this key."""
        return key in self._rows

    def rows(self, key: Key) -> list[int]:
        """Indices of the rows of a key."""
        return self._rows.get(key, [])

    def known(self, key: Key) -> Key:
        """The longest beginning of a key of which there are rows."""
        while key and key not in self._rows:
            key = key[:-1]
        return key

    def fit(self, key: Key) -> Fit:
        """The fit of a key, or of the longest beginning of it that has rows."""
        known = self.known(key)
        if known not in self._fits:
            self._fits[known] = self._make(known, own=len(known) == len(self._keys[0]))
        return self._fits[known]

    def _make(self, key: Key, *, own: bool) -> Fit:
        coefficients = self._solve(key, self._rows[key])
        if not own:
            return Fit(coefficients, None, (), 0.0)
        kept = list(self._rows[key])
        odd: list[int] = []
        while True:
            correction, surprise = smooth(self._places[kept], self._residuals(kept, coefficients), self._noise)
            worst = int(np.argmax(np.abs(surprise)))
            if abs(surprise[worst]) <= ODD_NOISES * self._noise or len(odd) > len(kept) // 4:
                usual = float(np.quantile(np.abs(surprise), 0.8))
                return Fit(coefficients, correction, tuple(sorted(odd)), usual)
            odd.append(kept.pop(worst))  # one at a time: it makes its neighbours look odd
            coefficients = self._solve(key, kept)

    def _residuals(self, rows: list[int], coefficients: Array) -> Array:
        return np.log(self._seconds[rows] / (self._features[rows] @ coefficients))

    def _shared(self, key: Key) -> Array:
        if key not in self._coefficients:
            self._coefficients[key] = self._solve(key, self._rows[key])
        return self._coefficients[key]

    def _solve(self, key: Key, rows: list[int]) -> Array:
        scaled = self._features[rows] / self._seconds[rows, None]
        if not key:
            return nnls(scaled, np.ones(len(rows)))[0]
        pull = np.sqrt(SHARED_WEIGHT) * self._usual
        return nnls(
            np.vstack([scaled, np.diag(pull)]), np.concatenate([np.ones(len(rows)), pull * self._shared(key[:-1])])
        )[0]
