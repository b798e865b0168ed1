"""Speculation for simulators, in whose steps every decode yields one token: its cost spread over what it yields."""

from __future__ import annotations

from dataclasses import replace

from thalweg.planner.cost import NOTHING, Estimate, StepWork, total
from thalweg.planner.step_cost import ModelStepCost


class PerTokenCost:
    """Prices a step of one token per decode as its share of the speculative step that yields several. Chunks of prompts
    in it are priced whole. Without speculation it is the cost itself."""

    def __init__(self, cost: ModelStepCost) -> None:
        self.cost = cost
        speculation = cost.deployment.speculation
        self._each = 1 + speculation.drafts if speculation else 1
        self._accepted = speculation.accepted if speculation else 1.0

    def seconds(self, work: StepWork) -> float:
        """The step's share, cheaply."""
        if self._each == 1 or not work.decodes:
            return self.cost.seconds(work)
        chunks, decodes = self._split(work)
        return self.cost.seconds(chunks) + self.cost.seconds(decodes) / self._accepted

    def estimate(self, work: StepWork) -> Estimate:
        """The step's share with its interval and origin."""
        if self._each == 1 or not work.decodes:
            return self.cost.estimate(work)
        chunks, decodes = self._split(work)
        first = self.cost.estimate(chunks) if chunks.chunks else NOTHING
        return total((first, self.cost.estimate(decodes) * (1 / self._accepted)))

    def _split(self, work: StepWork) -> tuple[StepWork, StepWork]:
        decodes = replace(work, chunks=(), decode_tokens=work.decodes * self._each, sampled=work.decodes * self._each)
        return StepWork(work.chunks, sampled=max(0, work.sampled - work.decodes)), decodes
