"""What a request came to: the one value behind /metrics, the request log and the live page. It has no token or text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request at its end. Spans are seconds.

    `queue_seconds` + `load_seconds` + prefill_seconds + decode_seconds = `seconds`, from arrival to end.
    `prompt_sources` (device, host, disk, replayed, computed) adds up to `prompt_tokens`.
    """

    request_id: str
    caller: str  # the name of an API key; empty without keys
    ended_at: float  # Unix time
    reason: str  # stop, length, cancelled or error
    miss_reason: str | None  # None: it never came to look
    prompt_tokens: int
    output_tokens: int
    prompt_sources: Mapping[str, int]  # empty where it never came to look
    preemptions: int
    queue_seconds: float
    load_seconds: float
    first_token_seconds: float | None  # from arrival
    seconds: float
    error: str | None = None  # kind of the error that ended it

    @property
    def prefill_seconds(self) -> float:
        """First step to first token, or to the end where there was none."""
        until = self.seconds if self.first_token_seconds is None else self.first_token_seconds
        return max(0.0, until - self.queue_seconds - self.load_seconds)

    @property
    def decode_seconds(self) -> float:
        """First token to end."""
        return 0.0 if self.first_token_seconds is None else self.seconds - self.first_token_seconds

    @property
    def token_seconds(self) -> float | None:
        """Mean time of an output token after the first; None where there was one or none."""
        return self.decode_seconds / (self.output_tokens - 1) if self.output_tokens > 1 else None
