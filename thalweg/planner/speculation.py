"""How many tokens a speculative decode step yields: drawn for every request and step, the same for the same seed."""

from __future__ import annotations

import random

from thalweg.planner.layout import Speculation

CONCENTRATION = 12.0  # of the requests' acceptance rates around their mean: most lie within 0.13 of it


def draft_rate(speculation: Speculation) -> float:
    """The chance that a draft is accepted after those before it were, which gives the mean that is asked for."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(middle**n for n in range(speculation.drafts + 1))
        low, high = (middle, high) if mean < speculation.accepted else (low, middle)
    return (low + high) / 2


class Acceptance:
    """Of one deployment. Each request has a rate of its own, around the mean, for all its drafts."""

    def __init__(self, speculation: Speculation, seed: int) -> None:
        self.drafts, self._seed = speculation.drafts, seed
        self._mean = draft_rate(speculation)

    def of(self, request_id: str) -> Accepted:
        """The draws of one request."""
        source = random.Random(f"{self._seed} {request_id}")
        mean = self._mean
        rate = source.betavariate(CONCENTRATION * mean, CONCENTRATION * (1 - mean)) if 0 < mean < 1 else mean
        return Accepted(self.drafts, rate, source)


class Accepted:
    """How many tokens each step of a request yields."""

    def __init__(self, drafts: int, rate: float, source: random.Random) -> None:
        self._drafts, self._rate, self._source = drafts, rate, source

    def next(self) -> int:
        """Of the next step: the sure one and the drafts before the first wrong one."""
        tokens = 1
        while tokens <= self._drafts and self._source.random() < self._rate:
            tokens += 1
        return tokens
