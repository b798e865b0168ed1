"""A step cost that is asked less often: contexts of decodes are taken in grains of 1/64 and prices remembered.

A context is off by less than 0.8%, and what it adds to a step by no more; chunks of prompts are priced as they are.
"""

from __future__ import annotations

from dataclasses import replace

from thalweg.planner.cost import Estimate, StepCost, StepWork

_GRAIN_BITS = 7
_MOST_PRICES = 1 << 18


class CoarseCost:
    """Wraps another cost."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._prices: dict[tuple[int, ...], float] = {}

    def seconds(self, work: StepWork) -> float:
        if work.chunks:
            return self._cost.seconds(_coarse(work))
        key = (work.decodes, work.decode_tokens, _grain(work.decode_context), _grain(work.longest_context))
        price = self._prices.get(key)
        if price is None:
            if len(self._prices) >= _MOST_PRICES:
                self._prices.clear()
            price = self._prices[key] = self._cost.seconds(_coarse(work))
        return price

    def estimate(self, work: StepWork) -> Estimate:
        return self._cost.estimate(_coarse(work))

    def decodes(self, count: int, context: int, longest: int) -> tuple[float, int]:
        """The price of a step of so many decodes, one token each, and for how many steps to come it stays the same."""
        price = self.seconds(StepWork((), count, count, context, longest, count))
        return price, max(1, min(-(-_left(context) // count), _left(longest)))


def _coarse(work: StepWork) -> StepWork:
    return replace(work, decode_context=_grain(work.decode_context), longest_context=_grain(work.longest_context))


def _grain(tokens: int) -> int:
    """The middle of the grain that so many tokens are in."""
    shift = max(0, tokens.bit_length() - _GRAIN_BITS)
    return (tokens >> shift << shift) + (1 << shift >> 1)


def _left(tokens: int) -> int:
    """Tokens up to the next grain."""
    shift = max(0, tokens.bit_length() - _GRAIN_BITS)
    return ((tokens >> shift) + 1 << shift) - tokens
