"""The live page at `/` and its one source of data, `/live`: what the server remembers anyway, as JSON.

Requests are shown to whom they belong; sums of the whole server, which /metrics has too, to every caller. Nothing here
asks the engine to do anything: it reads the snapshot that the engine takes between steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import thalweg
from thalweg.engine.runtime import Runtime
from thalweg.engine.status import EngineStatus
from thalweg.memory.capacity import CachePlan
from thalweg.metrics.finished import FinishedRequest
from thalweg.metrics.prometheus import TierGauges
from thalweg.server.access import LIVE_PAGE_PATHS, caller_of
from thalweg.server.history import SAMPLE_SECONDS, History, Ledger
from thalweg.server.record import RequestRecord
from thalweg.server.service import Service

MOST_OPEN = 80  # requests shown; the others are counted
_PAGE = Path(thalweg.__file__).parent / "data" / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_KINDS |= {".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_SHOWN_CHOICES = ("device", "dtype", "threads", "kv cache dtype", "index cache dtype", "prefix caching")


def add_live_page(app: FastAPI, service: Service, *, wants_key: bool) -> None:
    """Routes of the page, open to all as it holds no data, and of its data. `wants_key`: that needs an API key."""
    about = _about(service.runtime)

    def page_route(path: str) -> None:
        file = _PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        content, kind = file.read_bytes(), _KINDS[file.suffix]
        if wants_key:  # so that the page asks for one before it asks for data
            content = content.replace(b'<html lang="en">', b'<html lang="en" data-key="wanted">')

        async def page() -> Response:
            return Response(content, media_type=kind, headers={**_HEADERS, "Cache-Control": "no-cache"})

        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    for path in sorted(LIVE_PAGE_PATHS):
        page_route(path)

    @app.get("/live")
    async def live(request: Request) -> Response:
        """Requests of the caller, and the state of the server."""
        caller = caller_of(request)
        status = service.runtime.engine.status()
        fields = {
            "now": time.time(),
            "caller": caller.name or None,
            "about": {**about, "uptime_seconds": time.time() - service.created},
            "status": _status(status),
            **_requests(service.history.ledger(caller.tenant)),
            "groups": _groups(status, service.runtime.cache_plan),
            "tiers": [_tier(tier) for tier in service.runtime.engine.tiers()],
            "speed": _speed(service.history),
        }
        return JSONResponse(fields, headers={**_HEADERS, "Cache-Control": "no-store"})


def _about(runtime: Runtime) -> dict[str, Any]:
    """What does not change while the server runs. No path of this machine is in it."""
    backends: dict[str, list[str]] = {}
    for choice in runtime.kernel_set.choices:
        backends.setdefault(choice.backend, []).append(choice.op)
    return {
        "version": thalweg.__version__,
        "model": runtime.model_name,
        "max_model_len": runtime.max_model_len,
        "cache_tokens": runtime.cache_plan.token_capacity,
        "max_running": runtime.cache_plan.max_running,
        "kernels": backends,
        "choices": {choice.what: choice.value for choice in runtime.choices if choice.what in _SHOWN_CHOICES},
    }


def _status(status: EngineStatus) -> dict[str, Any]:
    return {
        "healthy": status.healthy,
        "running": status.running,
        "waiting": status.waiting,
        "loading": status.loading,
        "preemptions": status.counters.get("preemptions", 0),
    }


def _requests(ledger: Ledger) -> dict[str, Any]:
    """Open requests, the furthest first; ended ones, the last first; and sums over all that ended."""
    rows = [_open(record) for record in ledger.open.values()]
    rows.sort(key=lambda row: ("decode", "prefill", "loading", "queued").index(row["phase"]))
    return {
        "open": rows[:MOST_OPEN],
        "more_open": max(0, len(rows) - MOST_OPEN),
        "finished": [_finished(request) for request in reversed(ledger.finished)],
        "totals": {"reasons": ledger.reasons, "sources": ledger.sources, "ended": ledger.ended},
    }


def _open(record: RequestRecord) -> dict[str, Any]:
    timeline, (queue, load, prefill) = record.timeline(), record.spans()
    decoding = record.first_token_seconds is not None
    started = timeline is not None and timeline.started is not None
    loading = timeline is not None and timeline.loading is not None
    return {
        "id": record.request_id,
        "phase": "decode" if decoding else "prefill" if started else "loading" if loading else "queued",
        "prompt_tokens": record.prompt_tokens,
        "done_tokens": record.done_tokens,
        "output_tokens": record.output_tokens,
        "seconds": _spans(queue, load, prefill, record.seconds),
    }


def _finished(request: FinishedRequest) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "ended_at": request.ended_at,
        "reason": request.reason,
        "error": request.error,
        "miss_reason": request.miss_reason,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "sources": request.prompt_sources,
        "preemptions": request.preemptions,
        "seconds": _spans(request.queue_seconds, request.load_seconds, request.prefill_seconds, request.seconds),
        "ttft_seconds": request.first_token_seconds,
        "tpot_seconds": request.token_seconds,
    }


def _spans(queue: float, load: float, prefill: float, whole: float) -> dict[str, float]:
    spans = {"queue": queue, "load": load, "prefill": prefill, "decode": max(0.0, whole - queue - load - prefill)}
    return {name: round(seconds, 4) for name, seconds in spans.items()}


def _groups(status: EngineStatus, plan: CachePlan) -> list[dict[str, Any]]:
    """Blocks of each pool: free + idle + in_use = total; `shared` are those in use that the prefix index holds too."""
    sizes = {spec.group.value: plan.layout.block_bytes(spec) for spec in plan.groups}
    return [
        {
            "group": group.group,
            "block_bytes": sizes[group.group],
            "total": group.total_blocks,
            "free": group.free_blocks,
            "idle": group.idle_blocks,
            "cached": group.cached_blocks,
            "in_use": group.total_blocks - group.free_blocks - group.idle_blocks,
            "shared": group.cached_blocks - group.idle_blocks,
        }
        for group in status.groups
    ]


def _tier(tier: TierGauges) -> dict[str, Any]:
    return {
        "tier": tier.name,
        "capacity_bytes": tier.capacity_bytes,
        "used_bytes": tier.used_bytes,
        "records": tier.records,
        "hits": tier.counters.get("hits", 0),
        "read_bytes": tier.counters.get("read_bytes", 0),
        "write_bytes": tier.counters.get("write_bytes", 0),
        "evicted_bytes": tier.counters.get("evicted_bytes", 0),
    }


def _speed(history: History) -> dict[str, Any]:
    """Tokens a second in each of the last sampled spans, oldest first, of all callers."""
    samples = list(history.samples)
    spans = [(b.seconds - a.seconds, a, b) for a, b in pairwise(samples)]
    return {
        "sample_seconds": SAMPLE_SECONDS,
        "prefill": _rates((seconds, b.prefill_tokens - a.prefill_tokens) for seconds, a, b in spans),
        "decode": _rates((seconds, b.decode_tokens - a.decode_tokens) for seconds, a, b in spans),
    }


def _rates(spans: Iterable[tuple[float, int]]) -> list[float]:
    return [round(tokens / seconds, 1) if seconds > 0 else 0.0 for seconds, tokens in spans]
