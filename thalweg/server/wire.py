"""Errors in the form of the API that was called: OpenAI's, or Anthropic's under the Messages paths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from thalweg.errors import OverloadedError, ThalwegError

MESSAGES_PATHS = ("/v1/messages", "/anthropic/")
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_fields(error: ThalwegError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"message": error.message, "type": error.kind, "param": error.param, "code": error.kind}


def anthropic_error(error: ThalwegError, status: int | None = None) -> dict[str, Any]:
    """Anthropic's error object, whose type is that of the HTTP status."""
    status = error.status if status is None else status
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: ThalwegError, path: str, status: int | None = None) -> JSONResponse:
    """The response to a request of `path`. `status` is the error's own where it is left out."""
    status = error.status if status is None else status
    after = error.retry_after_seconds if isinstance(error, OverloadedError) else None
    headers = {"Retry-After": str(math.ceil(after or 1))} if error.retryable else None
    anthropic = path.startswith(MESSAGES_PATHS)
    fields = anthropic_error(error, status) if anthropic else {"error": error_fields(error)}
    return JSONResponse(fields, status_code=status, headers=headers)
