"""Where a prompt's tokens came from, as a response says it: to clients that ask, and every approximation to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from thalweg.errors import RequestError
from thalweg.types import Usage

_ASKING = "x-thalweg-cache-report"
_YES, _NO = ("1", "true"), ("0", "false")


def report_fields(usage: Usage) -> dict[str, Any]:
    """The `cache` object. device + host + disk + replayed + computed tokens = prompt_tokens."""
    report = usage.cache
    return {
        "prompt_tokens": usage.prompt_tokens,
        "device_tokens": report.device_tokens,
        "host_tokens": report.host_tokens,
        "disk_tokens": report.disk_tokens,
        "replayed_tokens": report.replayed_tokens,
        "computed_tokens": usage.computed_tokens,
        "resume_token": report.cached_tokens,
        "divergence_token": report.divergence_token,
        "reason": report.reason.value,
        "approximation": report.approximation,
    }


@dataclass(frozen=True, slots=True)
class CacheReporting:
    """What one response says of the cache. `in_body`: the `cache` field; `in_headers`: X-Thalweg-Cache."""

    in_body: bool
    in_headers: bool

    @classmethod
    def of(cls, request: Request, field: bool | None) -> CacheReporting:
        """As the body's return_cache_report or the request header X-Thalweg-Cache-Report ask. Raises RequestError."""
        asked = request.headers.get(_ASKING, "0").strip().lower()
        if asked not in (*_YES, *_NO):
            raise RequestError(f"{_ASKING} is {asked!r}; it must be 1 or 0", param=_ASKING)
        return cls(bool(field) or asked in _YES, asked in _YES)

    def of_response(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """Top-level fields of a whole response: `cache` is an object, or a list where there are several choices."""
        reports = [report_fields(usage) for usage in usages]
        fields: dict[str, Any] = {"cache": reports[0] if len(reports) == 1 else reports} if self.in_body else {}
        names = _approximations(usages)
        return fields | {"approximation": names} if names else fields

    def of_chunk(self, usage: Usage | None, *, last: bool) -> dict[str, Any]:
        """Top-level fields of a chunk of one choice: `cache` with its `last` one, `approximation` with each."""
        if usage is None:
            return {}
        fields: dict[str, Any] = {"cache": report_fields(usage)} if self.in_body and last else {}
        names = _approximations([usage])
        return fields | {"approximation": names} if names else fields

    def headers(self, usages: Sequence[Usage]) -> dict[str, str]:
        """Headers of a whole response. Several reports would make a header of any length: then the body has them."""
        headers = {}
        names = _approximations(usages)
        if names:
            headers["X-Thalweg-Approximation"] = names
        if self.in_headers and len(usages) == 1:
            headers["X-Thalweg-Cache"] = _header(usages[0])
        return headers


def _approximations(usages: Sequence[Usage]) -> str:
    names = {usage.cache.approximation for usage in usages}
    return ", ".join(sorted(name for name in names if name is not None))


def _header(usage: Usage) -> str:
    fields = report_fields(usage)
    names = ("device", "host", "disk", "replayed", "computed")
    parts = [f"{name}={fields[f'{name}_tokens']}" for name in names]
    divergence = "none" if usage.cache.divergence_token is None else usage.cache.divergence_token
    return ";".join(
        [*parts, f"resume={fields['resume_token']}", f"divergence={divergence}", f"reason={fields['reason']}"]
    )
