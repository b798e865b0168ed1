"""One exception tree. Each error knows its HTTP status, its wire type and whether trying again can help.

ThalwegError
├── RequestError            400  the client's request is wrong; names the field and the limit
│   ├── ContextLengthError  400  prompt + output do not fit the model's or the pool's length
│   └── UnknownModelError   404  no such model here
├── CancelledError          499  the client went away or aborted
├── OverloadedError         429  admission refused; trying later helps
├── UnavailableError        503  starting, draining or restarting; trying later helps
├── EngineError             500  a step failed; only the requests in it end with this
├── ConfigError             500  an engine option or a model config is wrong (at start-up)
└── CheckpointError         500  a checkpoint tensor is missing, surplus, misshapen or unreadable
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST_NAME = 100  # a longer one is no slip of the pen, and comparing takes time


class ThalwegError(Exception):
    """Root of the tree. `param` names the offending field, option, tensor or file where there is one."""

    status = 500
    kind = "internal_error"
    retryable = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(ThalwegError):
    status = 400
    kind = "invalid_request_error"


class ContextLengthError(RequestError):
    kind = "context_length_exceeded"


class UnknownModelError(RequestError):
    status = 404
    kind = "model_not_found"


class CancelledError(ThalwegError):
    status = 499
    kind = "cancelled"


class OverloadedError(ThalwegError):
    """`retry_after_seconds` is after how long trying again may help, where that is known."""

    status = 429
    kind = "overloaded"
    retryable = True

    def __init__(self, message: str, *, param: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(ThalwegError):
    status = 503
    kind = "unavailable"
    retryable = True


class EngineError(ThalwegError):
    kind = "engine_error"
    retryable = True


class GrammarError(ThalwegError):
    kind = "grammar_error"


class ConfigError(ThalwegError):
    kind = "config_error"


class CheckpointError(ThalwegError):
    kind = "checkpoint_error"


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or the empty string."""
    if len(name) > _LONGEST_NAME:
        return ""
    match = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""
