"""A request inside the engine: its tokens, and, while it runs, the cache blocks that it owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from thalweg.cache.geometry import Group
from thalweg.cache.sequence import SequenceCache, Snapshot
from thalweg.types import (
    CacheReport,
    Event,
    FinishReason,
    GenerateRequest,
    MissReason,
    SampledToken,
    Timeline,
    TokenArray,
    Usage,
)

Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What the lower tiers gave to a waiting request: units from `first_unit` on, as runs of (tier, units)."""

    first_unit: int = 0
    by_tier: tuple[tuple[str, int], ...] = ()
    stored_units: int = 0  # leading units that a lower tier has
    failed: bool = False
    other_weights: bool = False


@dataclass(frozen=True, slots=True)
class Swapped:
    """A request that gave way: its blocks' bytes, uint8 [blocks, block bytes] by group, in host memory."""

    snapshot: Snapshot
    data: Mapping[Group, NDArray[np.uint8]]
    size_bytes: int


class KnownTokens(Protocol):
    """The tokens of one sequence as the cache and the runner see them: `count` of them. A simulator has its own kind,
    of which only the length is real."""

    count: int

    @property
    def known(self) -> TokenArray: ...

    def append(self, token: int) -> None: ...


class TokenBuffer:
    """Real ones: a growing array that begins with the prompt."""

    def __init__(self, prompt: TokenArray) -> None:
        self.count = len(prompt)
        self._tokens = np.array(prompt, np.int32)

    @property
    def known(self) -> TokenArray:
        """int32, without a copy."""
        return self._tokens[: self.count]

    def append(self, token: int) -> None:
        if self.count == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty(max(64, self.count // 8), np.int32)])
        self._tokens[self.count] = token
        self.count += 1


class Sequence:
    """The tokens of one request from submission to its terminal event: prompt, then output."""

    def __init__(
        self,
        request: GenerateRequest,
        listener: Listener,
        max_output_tokens: int,
        arrived: float,
        *,
        seed: int = 0,
        cold: bool = False,
        known: KnownTokens | None = None,
    ) -> None:
        self.request = request
        self.seed = seed  # of its random numbers: the request's own, or one drawn for it
        self.cold = cold  # reuse nothing and publish nothing
        self.listener = listener
        self.max_output_tokens = max_output_tokens
        self.timeline = Timeline(arrived)
        self.preemptions = 0
        self.uncached_tokens = len(request.prompt)  # as far as known when it was queued
        self.added_at = 0  # tokens that all steps together had computed by then
        self.cache_report = CacheReport(reason=MissReason.COLD)
        self.load: LoadOutcome | None = None  # once the lower tiers were asked
        self.swapped: Swapped | None = None
        self.rules = None if request.rules is None else request.rules.start()
        self.prompt_tokens = len(request.prompt)
        self._known = known or TokenBuffer(request.prompt)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def output_tokens(self) -> int:
        return self._known.count - self.prompt_tokens

    @property
    def tokens(self) -> TokenArray:
        """Prompt and output so far, int32, without a copy."""
        return self._known.known

    @property
    def output(self) -> TokenArray:
        """Output so far, int32, without a copy."""
        return self.tokens[self.prompt_tokens :]

    def __len__(self) -> int:
        return self._known.count

    def append(self, token: int) -> None:
        self._known.append(token)

    def finish_after(self, sampled: SampledToken, eos_token_ids: tuple[int, ...]) -> FinishReason | None:
        """Whether the token just appended ends the request."""
        params = self.request.sampling
        if self.rules is not None and self.rules.ends_with(sampled.token):
            return FinishReason.STOP
        if self.output_tokens >= params.min_tokens:
            stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)
            if sampled.token in stops:
                return FinishReason.STOP
        return FinishReason.LENGTH if self.output_tokens >= self.max_output_tokens else None

    def usage(self) -> Usage:
        """The bill so far. What was cached is what the first admission found: recomputing is our cost, not theirs."""
        return Usage(self.prompt_tokens, self.output_tokens, self.cache_report, self.preemptions, self.timeline)


@dataclass(slots=True, eq=False)
class Running:
    """A sequence that holds cache blocks."""

    sequence: Sequence
    cache: SequenceCache

    @property
    def remaining_tokens(self) -> int:
        """Tokens known but not computed: 1 while decoding."""
        return len(self.sequence) - self.cache.computed_tokens
