"""What one step of an engine costs: the work of a step as plain numbers, and the interface that prices it.

The simulator asks once per step, so a step's work is a few integers that hash: an implementation can remember what it
has priced, and many decodes are one group, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

MATTERS = 0.05
MOST_DECODE_TOKENS = 8  # a sequence of so few new tokens on a context is one decode, with its drafts


class Origin(StrEnum):
    """How far a figure is from a measurement, the nearest first."""

    MEASURED = "measured"  # a row of a table
    INTERPOLATED = "interpolated"  # between rows
    EXTRAPOLATED = "extrapolated"  # beyond them, by a fitted physical form
    BOUND = "bound"  # no row of this device and framework: from limits of the hardware


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, an interval that should hold 80% of measurements, and where the figure comes from."""

    seconds: float
    low: float
    high: float
    origin: Origin

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.seconds * factor, self.low * factor, self.high * factor, self.origin)


NOTHING = Estimate(0.0, 0.0, 0.0, Origin.MEASURED)


def total(parts: Iterable[Estimate]) -> Estimate:
    """The sum of times. Errors of parts are taken as shared (one device, one framework): intervals add, they do not
    cancel. The origin is the farthest that at least a twentieth of the sum has, or a farther one."""
    seconds = low = high = 0.0
    shares = dict.fromkeys(Origin, 0.0)
    for part in parts:
        seconds, low, high = seconds + part.seconds, low + part.low, high + part.high
        shares[part.origin] += part.seconds
    farther = 0.0
    for origin in reversed(Origin):
        farther += shares[origin]
        if farther > MATTERS * seconds:
            return Estimate(seconds, low, high, origin)
    return Estimate(seconds, low, high, Origin.MEASURED)


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """One sequence of one step: `new_tokens` computed behind `past_tokens` that are in the cache; `samples` if a token
    follows from the last of them."""

    new_tokens: int
    past_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step of one engine replica (with data parallel attention: of one rank; its peers are taken as alike).

    `chunks` are the (new, past) tokens of its prompt parts. Decodes are counted: how many, the tokens of context under
    all of them and under the longest, and the tokens that they compute (more than their number with speculation).
    """

    chunks: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    decode_tokens: int = 0
    decode_context: int = 0
    longest_context: int = 0
    sampled: int = 0

    @property
    def tokens(self) -> int:
        return self.decode_tokens + sum(new for new, _ in self.chunks)

    @classmethod
    def of(cls, sequences: Iterable[SequenceWork]) -> StepWork:
        """The sequences of a step, grouped."""
        chunks = []
        decodes = decode_tokens = context = longest = sampled = 0
        for item in sequences:
            sampled += item.samples
            if item.past_tokens and item.samples and item.new_tokens <= MOST_DECODE_TOKENS:
                decodes += 1
                decode_tokens += item.new_tokens
                context += item.past_tokens
                longest = max(longest, item.past_tokens)
            elif item.new_tokens:
                chunks.append((item.new_tokens, item.past_tokens))
        return cls(tuple(chunks), decodes, decode_tokens, context, longest, sampled)

    @classmethod
    def decode(cls, batch: int, context: int, tokens_each: int = 1) -> StepWork:
        """A batch of decodes at one length of context."""
        return cls((), batch, batch * tokens_each, batch * context, context, batch)

    @classmethod
    def prefill(cls, new_tokens: int, past_tokens: int = 0) -> StepWork:
        """One chunk of one prompt."""
        return cls(((new_tokens, past_tokens),))


class StepCost(Protocol):
    """Prices steps of one engine replica: a model on a device under a layout."""

    def seconds(self, work: StepWork) -> float:
        """The step's time, start to end, what the host adds included. Cheap: microseconds for work seen before."""
        ...

    def estimate(self, work: StepWork) -> Estimate:
        """The same time with its interval and origin."""
        ...
