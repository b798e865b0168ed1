"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from thalweg.errors import ThalwegError


def error_fields(error: ThalwegError) -> dict[str, Any]:
    return {"message": error.message, "type": error.kind, "param": error.param, "code": error.kind}


def error_response(error: ThalwegError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.retryable else None
    return JSONResponse({"error": error_fields(error)}, status_code=error.status, headers=headers)
