"""How wrong the planner is: errors of held-out measurements by layer, never pooled over layers.

Kernel: whole slices of NVIDIA's tables left out of the fit; contexts up to 64K fitted, 131K to 1M predicted. Ops: parts
of the tables of experts, hyper-connections, GEMMs and collectives. Step: timed steps of our own engine, the same way.
Serving: published times. Memory: published capacities. Beside them stand two baselines: limits of the hardware alone,
and a rate that does not depend on the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from thalweg.planner.cost import Estimate
from thalweg.planner.kernel_times import Finding
from thalweg.planner.serving_rows import Comparison


@dataclass(frozen=True, slots=True)
class Trial:
    """One held-out measurement, what was predicted of it, and what the baselines say."""

    what: str
    measured: float
    estimate: Estimate
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.estimate.seconds / self.measured - 1


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of one slice of a layer. `coverage`: share of measurements inside their 80% interval."""

    layer: str
    slice: str
    count: int
    median: float
    p90: float
    bias: float
    coverage: float
    baselines: Mapping[str, float]  # median absolute error by baseline


@dataclass(frozen=True, slots=True)
class Regret:
    """Of choices by predictions of held-out rows: how much slower the chosen is than the best in hindsight."""

    choice: str
    count: int
    right: float
    mean: float
    p90: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `thalweg plan check` prints."""

    scores: tuple[Score, ...]
    regrets: tuple[Regret, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    findings: tuple[Finding, ...] = ()

    def score(self, layer: str, slice_: str) -> Score:
        """One slice's score. Raises StopIteration if there is none."""
        return next(s for s in self.scores if (s.layer, s.slice) == (layer, slice_))

    def plain(self) -> dict[str, object]:
        """As plain values, for JSON."""
        rows = [
            {
                **asdict(c),
                "estimate": c.estimate.seconds if c.estimate else None,
                "low": c.estimate.low if c.estimate else None,
                "high": c.estimate.high if c.estimate else None,
                "origin": c.estimate.origin.value if c.estimate else None,
                "claimed": c.claimed,
            }
            for c in self.comparisons
        ]
        return {
            "layers": [asdict(s) for s in self.scores],
            "regret": [asdict(r) for r in self.regrets],
            "rows": rows,
            "findings": [{"what": f.what, "rows": [asdict(r) for r in f.rows]} for f in self.findings],
        }


def score(layer: str, slice_: str, trials: Iterable[Trial]) -> Score | None:
    """Median and p90 absolute relative error, signed median, coverage; None of no trials."""
    known = list(trials)
    if not known:
        return None
    errors = np.array([trial.error for trial in known])
    inside = [trial.estimate.low <= trial.measured <= trial.estimate.high for trial in known]
    names = sorted({name for trial in known for name in trial.baselines})
    baselines = {
        name: float(np.median([abs(t.baselines[name] / t.measured - 1) for t in known if name in t.baselines]))
        for name in names
    }
    return Score(
        layer,
        slice_,
        len(known),
        float(np.median(np.abs(errors))),
        float(np.quantile(np.abs(errors), 0.9)),
        float(np.median(errors)),
        float(np.mean(inside)),
        baselines,
    )


def regret(choice: str, options: Iterable[list[tuple[float, float]]]) -> Regret | None:
    """Of choices among (predicted, measured) costs, the lower the better; None if there was nothing to choose."""
    losses = []
    for option in options:
        if len(option) > 1:
            chosen = min(option, key=lambda pair: pair[0])[1]
            losses.append(chosen / min(measured for _, measured in option) - 1)
    if not losses:
        return None
    right = float(np.mean([loss == 0 for loss in losses]))
    return Regret(choice, len(losses), right, float(np.mean(losses)), float(np.quantile(losses, 0.9)))
