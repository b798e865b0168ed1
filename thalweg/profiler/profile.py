"""What is known of an endpoint: the values of `profile.json`, and what they predict.

A profile keeps raw samples by cell. Predictions are medians of single requests on an otherwise idle endpoint; each says
where it comes from: measured at that very point, interpolated between cells, extrapolated up to twice beyond the last
one, or, further away, only a bound. `holdout` cells were measured like the others and used in no prediction.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from thalweg.errors import ConfigError
from thalweg.profiler.surface import Estimate, Point, Surface

FORMAT = 1
_LOW, _HIGH = 10, 90  # percentiles: four of five single requests are expected between them


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """Who was measured, and what it can say of itself. None: it does not say."""

    url: str
    model: str
    max_model_len: int | None
    version: str | None
    server: str | None  # the header of that name
    api: str  # completions or chat: what probes were sent to
    cached_tokens_reported: bool
    hits_counted: bool  # /metrics counts tokens served from the cache
    usage_reported: bool  # else tokens are estimated from characters and chunks
    output_length_forced: bool  # ignore_eos is honoured
    stated_capacity_tokens: int | None  # of /metrics, where it is there
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TtftCell:
    """Prompts of about so many tokens, of which the share `reuse` was a prompt before.

    `seconds`: raw samples. `typical_seconds`: their median, after what all cells had in common in the same round was
    taken out (median polish of logarithms): a machine that is busy for a minute makes no cell slower than others.
    """

    context_tokens: int
    reuse: float
    row: float  # the share that was aimed at: cells of one row are of one curve
    cached_tokens: int | None  # median, as reported
    typical_seconds: float
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TpotCell:
    """Seconds per output token of each of `batch` requests that decode together at about so many tokens of context."""

    batch: int
    context_tokens: int
    typical_seconds: float
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Interference:
    """One cold prompt of `long_tokens` beside one running answer and prompts of `short_tokens`: seconds."""

    long_tokens: int
    short_tokens: int
    tpot_alone: tuple[float, ...]
    tpot_beside: tuple[float, ...]
    short_ttft_alone: tuple[float, ...]
    short_ttft_beside: tuple[float, ...]
    long_ttft_alone: tuple[float, ...]
    long_ttft_beside: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Retained:
    """How much of a prefix was still served after so many seconds and so many other tokens."""

    age_seconds: float
    other_tokens: int
    share: float


@dataclass(frozen=True, slots=True)
class Fill:
    """Distinct prompts of `prompt_tokens` in a row, of which `served_tokens` each are served when asked for again.

    When the first was gone, `held_tokens` were still served; with `evicted` false none was gone: then it is a bound.
    """

    prompt_tokens: int
    served_tokens: int
    filled_tokens: int
    held_tokens: float
    evicted: bool


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What probing found of the prefix cache, in tokens. None: could not be told.

    A prefix of t shared tokens is served up to a multiple of `unit_tokens`, at most `lag_tokens` before t.
    A prompt of which t tokens are served takes t + `request_tokens` of `capacity_tokens`, and there are at most
    `most_prompts`, where that shows.
    """

    enabled: bool
    unit_tokens: int | None
    lag_tokens: int | None
    shortest_hit_tokens: int | None
    capacity_tokens: Estimate | None
    request_tokens: Estimate | None
    most_prompts: Estimate | None
    fills: tuple[Fill, ...] = ()
    retained: tuple[Retained, ...] = ()


@dataclass(frozen=True, slots=True)
class Queueing:
    """A long prompt, one of the same length, and a short one, sent in this order: when each had its first token."""

    discipline: str  # first-come, or short-first
    long_prompts: str  # one-by-one, or side-by-side
    seconds: tuple[tuple[float, float, float], ...]  # after each was sent


@dataclass(frozen=True, slots=True)
class Check:
    """One correctness probe: the same request cold, from the cache, and in company."""

    what: str  # needle or continuation
    prompt_tokens: int
    remainder: int  # of prompt_tokens modulo 4
    cold: str
    warm: str
    company: str
    expected: str | None  # of needles
    cached_tokens: int | None  # of the warm request

    @property
    def equal(self) -> bool:
        return self.cold == self.warm == self.company

    @property
    def found(self) -> bool:
        return self.expected is None or self.expected in self.cold

    @property
    def passed(self) -> bool:
        return self.equal and self.found


@dataclass(frozen=True, slots=True)
class Load:
    """Many requests: `concurrency` at a time (closed), or `rate` a second at random times (open).

    A request attains its objectives if its time to first token and its time per output token are both within limits.
    """

    kind: str  # closed or open
    concurrency: int | None
    rate: float | None
    context_tokens: int
    reuse: float
    output_tokens: int
    seconds: float
    ttft_seconds: tuple[float, ...]
    tpot_seconds: tuple[float, ...]
    attained: int  # requests within both limits
    failed: int

    @property
    def requests(self) -> int:
        return len(self.ttft_seconds)

    @property
    def attainment(self) -> float:
        return self.attained / max(1, self.requests + self.failed)

    @property
    def goodput(self) -> float:
        """Requests a second within both limits."""
        return self.attained / self.seconds


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits of a joint service level, in seconds."""

    ttft_seconds: float
    tpot_seconds: float


@dataclass(frozen=True, slots=True)
class Holdout:
    """Measured beside the rest, used in no prediction."""

    ttft: tuple[TtftCell, ...] = ()
    tpot: tuple[TpotCell, ...] = ()
    fills: tuple[Fill, ...] = ()

    def with_fills(self, fills: tuple[Fill, ...]) -> Holdout:
        return replace(self, fills=fills)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prediction beside what was measured."""

    what: str  # ttft, tpot or capacity
    where: str
    predicted: Estimate
    measured: float
    inside: float  # share of the single samples between low and high

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.predicted.value / self.measured - 1


@dataclass(frozen=True, slots=True)
class Profile:
    """`profile.json`. Cells are measured; `surface` has the plan's grid and what lies beyond it, each with its tag."""

    format: int
    thalweg: str
    created: str  # UTC
    seconds: float  # of measuring, all runs together
    plan: dict[str, Any]  # what was asked for
    endpoint: EndpointFacts
    objectives: Objectives
    warm_up: str
    ttft_cells: tuple[TtftCell, ...]
    tpot_cells: tuple[TpotCell, ...]
    cache: CacheFacts
    interference: Interference | None
    queueing: Queueing | None
    checks: tuple[Check, ...]
    loads: tuple[Load, ...]
    holdout: Holdout
    surface: dict[str, tuple[Point, ...]]  # ttft: (context, row); tpot: (context, batch)
    left_out: tuple[str, ...]  # what the time did not suffice for
    machine: dict[str, Any]  # of the client

    def ttft(self, context_tokens: float, reuse: float) -> Estimate:
        """Seconds to the first token of a prompt of so many tokens, of which this share was a prompt before."""
        return self._ttft_surface().at(context_tokens, reuse)

    def tpot(self, batch: float, context_tokens: float) -> Estimate:
        """Seconds per output token of each of `batch` requests that decode together."""
        return self._tpot_surface().at(context_tokens, batch)

    def capacity_tokens(self) -> Estimate | None:
        """Tokens of prompts that the prefix cache keeps; None: it keeps none, or it could not be told."""
        return self.cache.capacity_tokens

    def held_tokens(self, prompt_tokens: float) -> Estimate | None:
        """How many tokens the cache keeps of distinct prompts of this length. None: it keeps none, or not told."""
        capacity, request, most = self.cache.capacity_tokens, self.cache.request_tokens, self.cache.most_prompts
        if capacity is None:
            return None
        served = prompt_tokens - prompt_tokens % (self.cache.unit_tokens or 1)
        share = served / max(served + (request.value if request else 0.0), 1.0)
        share = min(share, most.value * served / capacity.value) if most else share
        high = None if capacity.high is None else capacity.high * share
        return Estimate(capacity.value * share, capacity.low * share, high, capacity.tag)

    def outcomes(self) -> list[Outcome]:
        """Every held-out cell beside its prediction."""
        found = []
        ttft, tpot = self._ttft_surface(), self._tpot_surface()
        for cell in self.holdout.ttft:
            where = f"{cell.context_tokens:,} tokens, {cell.reuse:.0%} reused"
            found.append(
                _outcome("ttft", where, ttft.at(cell.context_tokens, cell.reuse), cell.typical_seconds, cell.seconds)
            )
        for other in self.holdout.tpot:
            where = f"batch {other.batch} at {other.context_tokens:,} tokens"
            found.append(
                _outcome(
                    "tpot", where, tpot.at(other.context_tokens, other.batch), other.typical_seconds, other.seconds
                )
            )
        for fill in self.holdout.fills:
            predicted = self.held_tokens(fill.prompt_tokens)
            if predicted is not None and fill.evicted:
                where = f"prompts of {fill.prompt_tokens:,} tokens"
                found.append(_outcome("capacity", where, predicted, fill.held_tokens, (fill.held_tokens,)))
        return found

    def with_surface(self) -> Profile:
        """The same, with `surface` made of its cells."""
        ttft, tpot = self._ttft_surface(), self._tpot_surface()
        longest = self.endpoint.max_model_len
        return replace(self, surface={"ttft": tuple(ttft.table(longest)), "tpot": tuple(tpot.table(longest))})

    def _ttft_surface(self) -> Surface:
        return Surface([(c.row, c.context_tokens, c.reuse, *_spread(c)) for c in self.ttft_cells], rises=False)

    def _tpot_surface(self) -> Surface:
        cells = [(float(c.batch), c.context_tokens, float(c.batch), *_spread(c)) for c in self.tpot_cells]
        return Surface(cells, rises=True)

    def write(self, path: Path) -> None:
        """Publish crash-safely."""
        partial = path.with_name(path.name + ".part")
        with partial.open("wb") as file:
            file.write(_ADAPTER.dump_json(self, indent=1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Profile:
        """Raises ConfigError for a file that is no profile of this format, naming the first wrong field."""
        try:
            profile = _ADAPTER.validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", param="profile") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(f"{path} is no profile: {where}: {first['msg']}", param="profile") from error
        if profile.format != FORMAT:
            raise ConfigError(f"{path} has format {profile.format}; this version reads {FORMAT}", param="format")
        return profile


_ADAPTER = TypeAdapter(Profile)


def _spread(cell: TtftCell | TpotCell) -> tuple[float, float, float]:
    """What is typical, and the range of four of five samples."""
    low, high = np.percentile(cell.seconds, (_LOW, _HIGH))
    typical = cell.typical_seconds
    return typical, min(typical, float(low)), max(typical, float(high))


def _outcome(what: str, where: str, predicted: Estimate, measured: float, samples: tuple[float, ...]) -> Outcome:
    high = float("inf") if predicted.high is None else predicted.high
    inside = float(np.mean([predicted.low <= sample <= high for sample in samples]))
    return Outcome(what, where, predicted, measured, inside)


def errors_of(outcomes: list[Outcome]) -> Iterator[tuple[str, float, float, float, int]]:
    """(what, median and 90th percentile of absolute errors, signed median, count) for each kind that was held out."""
    for what in ("ttft", "tpot", "capacity"):
        errors = np.array([outcome.error for outcome in outcomes if outcome.what == what])
        if len(errors):
            sizes = np.abs(errors)
            yield what, float(np.median(sizes)), float(np.percentile(sizes, 90)), float(np.median(errors)), len(errors)
