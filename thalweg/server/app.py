"""The HTTP application: routes, error form and body limit. Nothing here computes; the engine has its own thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

import thalweg
from thalweg.errors import CancelledError, EngineError, RequestError, ThalwegError, UnavailableError, nearest
from thalweg.server.access import MAX_BODY_BYTES, ApiKeys, ForbiddenError, KeyCheck, caller_of
from thalweg.server.chat import chat_completions, encode_conversation
from thalweg.server.completions import completions
from thalweg.server.live import add_live_page
from thalweg.server.messages import count_tokens, messages
from thalweg.server.messages_input import CountBody, MessagesBody
from thalweg.server.openapi import api_document
from thalweg.server.profile import Profile
from thalweg.server.responses import responses
from thalweg.server.responses_input import ResponsesBody
from thalweg.server.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse_body
from thalweg.server.service import Service
from thalweg.server.wire import error_response
from thalweg.types import CACHE_TIERS


class BodyTooLargeError(RequestError):
    """The body is over MAX_BODY_BYTES, or over what the API key allows."""

    status = 413
    kind = "body_too_large"


class WrongContentTypeError(RequestError):
    """A body of another type than JSON."""

    status = 415


def create_app(service: Service, keys: ApiKeys | None = None) -> FastAPI:
    """The application over one service, open to all without `keys`. Its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.runtime.engine.start()
        watch = asyncio.create_task(service.history.watch(service.runtime.engine.status))
        yield
        watch.cancel()
        service.runtime.engine.close()

    app = FastAPI(title="thalweg", version=thalweg.__version__, lifespan=lifespan, openapi_url=None)
    wants_key = keys is not None and bool(keys.names)
    if keys is not None and wants_key:
        app.add_middleware(KeyCheck, keys=keys)
    _add_errors(app)
    _add_models(app, service)
    _add_generation(app, service)
    _add_operations(app, service)
    _add_text(app, service)
    add_live_page(app, service, wants_key=wants_key)
    document = api_document(app.routes, service.runtime.model_name, wants_key=wants_key)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(document)

    return app


async def read_body(service: Service, request: Request, kind: type[Body]) -> Body:
    """The checked JSON body; a large one is parsed off the event loop. Raises RequestError saying what is wrong."""
    body = await body_of(request)
    return await service.off_loop(len(body), lambda: parse_body(kind, _json_of(body)))


async def body_of(request: Request) -> bytes:
    """The whole body. Raises RequestError if its type or size is wrong, CancelledError if the client leaves within."""
    try:
        return await _bytes_of(request)
    except ClientDisconnect:
        raise CancelledError("the client disconnected within its request") from None


async def _bytes_of(request: Request) -> bytes:
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise WrongContentTypeError(f"content-type is {kind!r}; it must be application/json", param="content-type")
    declared = request.headers.get("content-length", "0")
    own = caller_of(request).limits.max_body_bytes
    most = MAX_BODY_BYTES if own is None else own
    body = bytearray()
    if declared.isdigit() and int(declared) <= most:
        async for part in request.stream():
            body += part
            if len(body) > most:
                break
    if len(body) > most or not declared.isdigit() or int(declared) > most:
        of_key = "" if own is None else ", max_body_bytes of this API key"
        raise BodyTooLargeError(f"the body is larger than the limit of {most} bytes{of_key}")
    return bytes(body)


def _json_of(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def _tiers_of(request: Request) -> frozenset[str]:
    """The query `tiers=device,host`; all of them where it is left out."""
    for name in request.query_params:
        if name != "tiers":
            raise RequestError(f"{name} is not a supported parameter.{nearest(name, ['tiers'])}", param=name)
    if "tiers" not in request.query_params:
        return frozenset(CACHE_TIERS)
    tiers = ",".join(request.query_params.getlist("tiers")).split(",")
    for tier in tiers:
        if tier not in CACHE_TIERS:
            known = f"{nearest(tier, CACHE_TIERS)} Tiers: {', '.join(CACHE_TIERS)}."
            raise RequestError(f"tiers has {tier!r}, which is no tier.{known}", param="tiers")
    return frozenset(tiers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ThalwegError)
    async def own(request: Request, error: ThalwegError) -> Response:
        return error_response(error, request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        wrapped = RequestError(f"{request.method} {request.url.path}: {error.detail}")
        response = error_response(wrapped, request.url.path, error.status_code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return error_response(RequestError(str(error.errors()[0]["msg"])), request.url.path)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return error_response(EngineError(f"internal error: {type(error).__name__}"), request.url.path)


def _add_models(app: FastAPI, service: Service) -> None:
    runtime = service.runtime

    def card() -> dict[str, Any]:
        """Fields of OpenAI's form and of Anthropic's: their clients read the same list."""
        created = datetime.fromtimestamp(service.created, UTC)
        return {
            "id": runtime.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "thalweg",
            "root": runtime.model_name,
            "max_model_len": runtime.max_model_len,
            "type": "model",
            "display_name": runtime.model_name,
            "created_at": created.isoformat().replace("+00:00", "Z"),
        }

    async def models() -> dict[str, Any]:
        name = runtime.model_name
        return {"object": "list", "data": [card()], "has_more": False, "first_id": name, "last_id": name}

    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card()

    for start in ("/v1", "", "/anthropic/v1"):
        app.add_api_route(f"{start}/models", models, methods=["GET"])
        app.add_api_route(f"{start}/models/{{name:path}}", model, methods=["GET"])


def _add_generation(app: FastAPI, service: Service) -> None:
    """Every spelling that clients use: DeepSeek's own API has no /v1, and /beta and /anthropic for some forms."""

    async def chat(request: Request) -> Response:
        return await chat_completions(service, await read_body(service, request, ChatBody), request)

    async def complete(request: Request) -> Response:
        return await completions(service, await read_body(service, request, CompletionBody), request)

    async def message(request: Request) -> Response:
        return await messages(service, await read_body(service, request, MessagesBody), request)

    async def count(request: Request) -> Response:
        return await count_tokens(service, await read_body(service, request, CountBody), request)

    async def respond(request: Request) -> Response:
        return await responses(service, await read_body(service, request, ResponsesBody), request)

    routes: tuple[tuple[str, tuple[str, ...], Callable[[Request], Awaitable[Response]]], ...] = (
        ("/chat/completions", ("/v1", "", "/beta", "/beta/v1"), chat),
        ("/completions", ("/v1", "", "/beta", "/beta/v1"), complete),
        ("/v1/messages", ("", "/anthropic"), message),
        ("/v1/messages/count_tokens", ("", "/anthropic"), count),
        ("/responses", ("/v1", ""), respond),
    )
    for path, starts, endpoint in routes:
        for start in starts:
            app.add_api_route(start + path, endpoint, methods=["POST"], response_model=None)


def _add_operations(app: FastAPI, service: Service) -> None:
    runtime = service.runtime

    @app.get("/health")
    async def health() -> Response:
        status = runtime.engine.status()
        if not status.healthy:
            raise UnavailableError(status.failure or "the engine is stopping")
        return JSONResponse({"status": "ok", "running": status.running, "waiting": status.waiting})

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """Whether requests would be served now: 503 before the engine runs, once it stops, and while a step hangs."""
        status = runtime.engine.status()
        if not status.healthy:
            raise UnavailableError(status.failure or "the engine is not running")
        if runtime.engine.draining:
            raise UnavailableError("the server is stopping")
        if stalled := runtime.engine.stalled_seconds():
            raise UnavailableError(f"a step has taken {stalled:.0f} s; the log says where")
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": thalweg.__version__}

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/flush_cache")
    @app.post("/reset_prefix_cache")
    async def reset(request: Request) -> dict[str, int]:
        if not caller_of(request).admin:
            raise ForbiddenError("this forgets what all callers have cached; it takes an API key with admin = true")
        tiers = _tiers_of(request)
        return {"forgotten_tokens": await asyncio.to_thread(runtime.engine.reset_prefix_cache, tiers)}

    profile = Profile(runtime.engine.status)

    @app.post("/start_profile")
    async def start_profile() -> dict[str, str]:
        return profile.start()

    @app.post("/stop_profile")
    async def stop_profile() -> dict[str, Any]:
        return profile.stop()


def _add_text(app: FastAPI, service: Service) -> None:
    runtime = service.runtime

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(service, request, TokenizeBody)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            text = body.prompt
            ids = await service.off_loop(len(text), lambda: service.encode_plain(text))
        else:
            ids = list((await encode_conversation(service, ChatBody(messages=body.messages or []))).token_ids)
        return {"tokens": ids, "count": len(ids), "max_model_len": runtime.max_model_len}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await read_body(service, request, DetokenizeBody)
        service.check_model(body.model)
        wrong = next((t for t in body.tokens if t >= runtime.tokenizer.vocab_size), None)
        if wrong is not None:
            last = runtime.tokenizer.vocab_size - 1
            raise RequestError(f"tokens has {wrong}; ids go from 0 to {last}", param="tokens")
        return {"prompt": runtime.tokenizer.decode(body.tokens)}
