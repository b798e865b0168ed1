"""The five shapes of traffic that an engine meets, as data, and traces drawn from them.

A session begins with a text that others share, then adds what the user or a tool says and what the model answers. Sizes
are log-normal, by their median and the spread of their logarithm; sessions start by a Poisson process. The same shape,
seed and rate give the same trace.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from thalweg.errors import ConfigError, nearest
from thalweg.planner.tokens import Piece
from thalweg.planner.trace import Session, Texts, Turn, conversation

_DRAWN_AT_ONCE = 1024  # sessions


@dataclass(frozen=True, slots=True)
class Sizes:
    """A log-normal size within bounds."""

    median: float
    spread: float
    least: float
    most: float

    def draw(self, random: np.random.Generator, count: int) -> list[float]:
        drawn = self.median * np.exp(self.spread * random.standard_normal(count))
        return np.clip(drawn, self.least, self.most).tolist()


@dataclass(frozen=True, slots=True)
class Shared:
    """Texts that sessions begin with: how many there are and how long; the n-th is chosen n ** -skew as often as the
    first."""

    count: int
    tokens: Sizes
    skew: float = 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """One shape. `first_input` is what a session says first; `copies` sessions of the same first prompt start together;
    `pause` lies between an answer and the next turn, in seconds; `rate` is sessions per second."""

    name: str
    shared: Shared
    first_input: Sizes
    input: Sizes
    output: Sizes
    turns: Sizes
    pause: Sizes
    rate: float
    copies: int = 1


_PEOPLE = Sizes(20.0, 0.8, 2.0, 600.0)
_TOOLS = Sizes(3.0, 0.8, 0.2, 120.0)
SHAPES = {
    shape.name: shape
    for shape in (
        Workload(
            "long-context-agents", Shared(8, Sizes(12_000, 0.3, 4_000, 32_000)), Sizes(30_000, 1.0, 1_000, 400_000),
            Sizes(1_500, 1.0, 50, 30_000), Sizes(400, 0.7, 20, 4_000), Sizes(15, 0.6, 2, 60), _TOOLS, 0.05,
        ),
        Workload(
            "coding-agents", Shared(4, Sizes(150_000, 0.5, 40_000, 500_000), 0.7), Sizes(800, 0.8, 50, 8_000),
            Sizes(2_500, 1.0, 50, 40_000), Sizes(500, 0.8, 20, 6_000), Sizes(12, 0.6, 2, 50), _TOOLS, 0.05,
        ),
        Workload(
            "short-chat", Shared(6, Sizes(700, 0.4, 200, 2_000)), Sizes(120, 1.0, 5, 4_000), Sizes(60, 1.0, 3, 2_000),
            Sizes(220, 0.7, 10, 2_000), Sizes(3, 0.7, 1, 20), _PEOPLE, 1.0,
        ),
        Workload(
            "rl-rollouts", Shared(1, Sizes(400, 0.0, 400, 400)), Sizes(1_500, 0.6, 100, 16_000), Sizes(1, 0.0, 1, 1),
            Sizes(6_000, 0.8, 200, 32_000), Sizes(1, 0.0, 1, 1), Sizes(0, 0.0, 0, 0), 0.2, copies=16,
        ),
    )
}  # fmt: skip
MIXED = {"short-chat": 0.80, "coding-agents": 0.10, "long-context-agents": 0.08, "rl-rollouts": 0.02}  # of sessions
NAMES = (*SHAPES, "mixed")


def workload_sessions(name: str, requests: int, seed: int, rate: float | None = None) -> Iterator[Session]:
    """Sessions of a shape until they have so many turns; the last one is cut short. `rate` None is the shape's own.

    Raises ConfigError for a name that is none of NAMES, or counts and rates that are not positive.
    """
    if name not in NAMES:
        raise ConfigError(f"workload: {name!r} is none of {', '.join(NAMES)}.{nearest(name, NAMES)}", param="workload")
    if requests < 1:
        raise ConfigError(f"requests: {requests} is below 1", param="requests")
    if rate is not None and not rate > 0:
        raise ConfigError(f"rate: {rate} is not above 0", param="rate")
    return _drawn(name, requests, np.random.default_rng(seed), rate)


def own_rate(name: str) -> float:
    """Of a shape: how often sessions start, per second, those that start together counted once."""
    return sum(SHAPES[shape].rate * share for shape, share in _shares(name).items())


def copies(name: str) -> float:
    """How many sessions start together, on average."""
    return sum(SHAPES[shape].copies * share for shape, share in _shares(name).items())


def _shares(name: str) -> dict[str, float]:
    return MIXED if name == "mixed" else {name: 1.0}


def _drawn(name: str, requests: int, random: np.random.Generator, rate: float | None) -> Iterator[Session]:
    shares = _shares(name)
    texts = Texts()
    makers = [_Maker(SHAPES[shape], random, texts) for shape in shares]
    arrivals = _arrivals(random, rate or own_rate(name), list(shares.values()))
    drawn = ((now, turns) for now, kind in arrivals for turns in makers[kind].sessions())
    for number, (now, turns) in enumerate(drawn):
        yield Session(f"s{number}", now, turns[:requests])
        requests -= len(turns)
        if requests <= 0:
            return


def _arrivals(random: np.random.Generator, rate: float, shares: list[float]) -> Iterator[tuple[float, int]]:
    """Endlessly: when a session starts, and the number of its shape."""
    now = 0.0
    while True:
        gaps = random.exponential(1 / rate, _DRAWN_AT_ONCE)
        kinds = random.choice(len(shares), _DRAWN_AT_ONCE, p=shares)
        for gap, kind in zip(gaps.tolist(), kinds.tolist(), strict=True):
            now += gap
            yield now, kind


class _Maker:
    """Draws sessions of one shape."""

    def __init__(self, shape: Workload, random: np.random.Generator, texts: Texts) -> None:
        self._shape, self._random, self._texts = shape, random, texts
        shared = shape.shared
        sizes = shared.tokens.draw(random, shared.count)
        self._prefixes = [(texts.named(shape.name, i), int(size)) for i, size in enumerate(sizes)]
        weights = np.arange(1, shared.count + 1) ** -shared.skew
        self._cumulated = np.cumsum(weights / weights.sum()).tolist()

    def sessions(self) -> list[tuple[Turn, ...]]:
        """Those that start together."""
        shape, random = self._shape, self._random
        place = min(bisect(self._cumulated, random.random()), len(self._prefixes) - 1)
        prefix: tuple[Piece, ...] = (self._prefixes[place],)
        if shape.copies > 1:
            prefix = (*prefix, (self._texts.new(), int(shape.first_input.draw(random, 1)[0])))
        return [self._session(prefix, first=shape.copies == 1) for _ in range(shape.copies)]

    def _session(self, prefix: tuple[Piece, ...], *, first: bool) -> tuple[Turn, ...]:
        shape, random = self._shape, self._random
        turns = round(shape.turns.draw(random, 1)[0])
        inputs = [int(size) for size in shape.input.draw(random, turns)]
        inputs[0] = int(shape.first_input.draw(random, 1)[0]) if first else 0
        outputs = [int(size) for size in shape.output.draw(random, turns)]
        pauses = shape.pause.draw(random, turns)
        return conversation(self._texts, prefix, list(zip(inputs, outputs, pauses, strict=True)))
