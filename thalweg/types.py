"""Frozen values that cross boundaries: GenerateRequest goes down to the engine, TokenEvents come back up."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from thalweg.errors import ThalwegError

TokenArray = npt.NDArray[np.int32]
CACHE_TIERS = ("device", "host", "disk")  # where cached rows live, nearest first


class FinishReason(StrEnum):
    """Why a request ended. `error` and `cancelled` never reach a client as a finish_reason."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class MissReason(StrEnum):
    """Why a prompt was not served further from the cache; one per request."""

    NONE = "none"  # every unit that could be reused was reused
    COLD = "cold"  # nothing under this namespace yet
    TOO_SHORT = "too-short"  # the prompt has no complete unit before its last token
    DIVERGED = "diverged"  # other tokens from `divergence_token` on
    EVICTED = "evicted"  # the rows were here and gave way to others
    NO_CHECKPOINT = "no-checkpoint"  # compressed rows match further than the last checkpoint
    TENANT = "tenant"  # the same key has these tokens under another cache_salt
    WEIGHTS = "weights"  # the disk tier has these tokens, computed by another model or numerics
    LOAD_FAILED = "load-failed"  # rows of a lower tier could not be read, or were damaged
    DISABLED = "disabled"  # prefix caching is off


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How output tokens are chosen. Temperature 0 is greedy. Limits are checked where requests enter."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: up to the model's length
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; n: the chosen token and the n most likely ones
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """What the next token may be: the `forced` one, or any of the mask's but the banned ones.

    `mask` has one bit per token id, the lowest bit of the first byte for id 0; None allows all. `may_end` says whether
    an end-of-sequence token may come, whatever the mask has for it.
    """

    forced: int | None = None
    banned: tuple[int, ...] = ()
    mask: bytes | None = None
    may_end: bool = True


class OutputState(Protocol):
    """How far one output is in its rules."""

    def allowed(self, output: TokenArray) -> AllowedTokens | None:
        """What may follow the output so far, int32 [output tokens], that of the last call and more; None for anything.
        Raises GrammarError."""
        ...

    def ends_with(self, token: int) -> bool:
        """Whether this token, chosen next, ends the output whatever the sampling says."""
        ...


class OutputRules(Protocol):
    """What outputs must keep to. Never changes; every output has a state of its own."""

    def start(self) -> OutputState: ...


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to continue. `prompt` is int32 [prompt_tokens], at least one token.

    `tenant` and `cache_salt` separate prefix caches: prompts that differ in either never share. The tenant is the
    server's own word, made of the caller's API key; the salt is the client's, and can only divide a tenant further.
    `cache_hints` are prompt positions at which later prompts are likely to diverge. `rules` hold for the output.
    Lower `priority` goes first, before all else that is weighed. With `announce` the first event is Queued.
    """

    request_id: str
    prompt: TokenArray
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    cache_salt: str = ""
    cache_hints: tuple[int, ...] = ()
    rules: OutputRules | None = None
    priority: int = 0
    announce: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log, of the raw distribution before penalties and truncation) of one token."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One output token, with its log-probability and the most likely alternatives where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Where the tokens of a prompt came from, and why no more of them were cached.

    cached_tokens + replayed_tokens + computed tokens = prompt_tokens. Replayed tokens are computed only to rebuild the
    window state at the end of the cached rows.
    """

    device_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    replayed_tokens: int = 0
    reason: MissReason = MissReason.NONE
    divergence_token: int | None = None
    approximation: str | None = None  # the window policy, where it makes the answer an approximate one

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed; also where computing begins."""
        return self.device_tokens + self.host_tokens + self.disk_tokens


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the engine first did what with a request, in seconds of its clock; None: not yet, or never."""

    arrived: float
    loading: float | None = None  # rows of lower tiers are on their way
    started: float | None = None  # planned into a step


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. prompt_tokens = cached_tokens + replayed tokens + computed_tokens."""

    prompt_tokens: int
    output_tokens: int
    cache: CacheReport
    preemptions: int = 0
    timeline: Timeline | None = None

    @property
    def cached_tokens(self) -> int:
        return self.cache.cached_tokens

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens computed for the first time."""
        return self.prompt_tokens - self.cache.cached_tokens - self.cache.replayed_tokens


@dataclass(frozen=True, slots=True)
class Queued:
    """The request was taken in. `expected_seconds` is an estimate of the time to its first token; None: not known."""

    request_id: str
    expected_seconds: float | None


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far the prompt of a request is: positions below `done_tokens` are in the cache."""

    request_id: str
    done_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Output of one step for one request. Exactly one event per request has `finish` set, and it is the last."""

    request_id: str
    tokens: tuple[SampledToken, ...]
    usage: Usage
    finish: FinishReason | None = None
    error: ThalwegError | None = None


Event = Queued | PrefillProgress | TokenEvent
