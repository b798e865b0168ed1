"""A step's cost as a line through measured steps: what an endpoint's own timings say, without any table of kernels.

    seconds = step + new_token * new + new_token_context * sum(new * middle of its context)
                   + decode * decodes + decode_context * (tokens of context under all decodes)

Coefficients are fitted by least squares of relative errors and are never negative. The interval is that of the fit's
own residuals; work beyond what was measured is marked as extrapolated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from thalweg.errors import ConfigError, nearest
from thalweg.planner.cost import Estimate, Origin, StepWork

_INTERVAL = (0.1, 0.9)  # quantiles of measured / fitted that an 80% interval spans


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds per step, per token of a prompt, per such token and token of its context, per decode, and per token of
    context under a decode. `low` and `high`: measured times as shares of the fitted ones. `most_*`: what was measured.
    """

    step: float
    new_token: float
    new_token_context: float
    decode: float
    decode_context: float
    low: float = 1.0
    high: float = 1.0
    most_context: int = 0
    most_tokens: int = 0

    def seconds(self, work: StepWork) -> float:
        prompts = 0.0
        for new, past in work.chunks:
            prompts += new * (self.new_token + self.new_token_context * (past + new / 2))
        return self.step + prompts + self.decode * work.decode_tokens + self.decode_context * work.decode_context

    def estimate(self, work: StepWork) -> Estimate:
        seconds = self.seconds(work)
        deepest = max([work.longest_context, *(new + past for new, past in work.chunks)])
        known = deepest <= self.most_context and work.tokens <= self.most_tokens
        origin = Origin.INTERPOLATED if known else Origin.EXTRAPOLATED
        return Estimate(seconds, seconds * self.low, seconds * self.high, origin)

    @classmethod
    def fitted(cls, measured: Sequence[tuple[StepWork, float]]) -> LinearCost:
        """Through measured steps and their seconds. Raises ConfigError where they are too few."""
        if len(measured) < 5:
            raise ConfigError(f"cost: {len(measured)} measured steps; at least 5 are needed", param="cost")
        rows = np.array([_terms(work) for work, _ in measured])
        times = np.array([seconds for _, seconds in measured])
        scaled = rows / times[:, None]
        norms = np.linalg.norm(scaled, axis=0)
        norms[norms == 0] = 1.0
        found = nnls(scaled / norms, np.ones(len(times)))[0] / norms
        ratio = times / np.maximum(rows @ found, 1e-12)
        low, high = (float(q) for q in np.quantile(ratio, _INTERVAL))
        deepest = max(max([w.longest_context, *(n + p for n, p in w.chunks)]) for w, _ in measured)
        step, token, token_context, decode, decode_context = (float(c) for c in found)
        most = max(w.tokens for w, _ in measured)
        return cls(step, token, token_context, decode, decode_context, low, high, deepest, most)

    @classmethod
    def load(cls, path: str | Path) -> LinearCost:
        """From a JSON file of these fields. Raises ConfigError naming the field."""
        file = Path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cost: {file} is no readable JSON: {error}", param="cost") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict):
            raise ConfigError(f"cost: {file} holds no JSON object", param="cost")
        for name, value in values.items():
            if name not in names:
                raise ConfigError(f"cost: {file}: no such field {name!r}.{nearest(name, names)}", param="cost")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"cost: {file}: {name} is {value!r}, not a number of at least 0", param="cost")
        missing = [f for f in ("step", "new_token", "new_token_context", "decode", "decode_context") if f not in values]
        if missing:
            raise ConfigError(f"cost: {file}: {missing[0]} is missing", param="cost")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def _terms(work: StepWork) -> tuple[float, ...]:
    return (
        1.0,
        sum(new for new, _ in work.chunks),
        sum(new * (past + new / 2) for new, past in work.chunks),
        work.decode_tokens,
        work.decode_context,
    )
