"""The OpenAPI document: every endpoint with its body, its answers and its errors. `tests/server/test_openapi.py` holds
the server to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

import thalweg
from thalweg.server.access import is_open
from thalweg.server.json_schemas import ANYTHING, TEXT, Schema, any_of, one_of_values, ref
from thalweg.server.messages_input import CountBody, MessagesBody
from thalweg.server.openapi_answers import ANSWERS
from thalweg.server.openapi_requests import FIELDS, PARTS
from thalweg.server.responses_input import ResponsesBody
from thalweg.server.schemas import (
    WITHOUT_EFFECT,
    ApiBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from thalweg.server.wire import MESSAGES_PATHS
from thalweg.types import CACHE_TIERS

_REF = "#/components/schemas/{model}"
_OF_BODIES = (400, 413, 415)
_OF_MODELS = (404,)
_OF_ANSWERS = (429, 500, 503)
# One event; its data is JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"event": TEXT, "data": TEXT}, "required": ["data"]}
_TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint, whatever its paths. `answer` names a schema of ANSWERS; None for text that is no JSON."""

    summary: str
    answer: str | None
    errors: tuple[int, ...] = ()
    body: type[ApiBody] | None = None
    streams: bool = False
    parameters: tuple[Schema, ...] = ()


def _generation(summary: str, answer: str, body: type[ApiBody]) -> Operation:
    reported = _header("X-Thalweg-Cache-Report", one_of_values("0", "1", "true", "false"))
    return Operation(summary, answer, (*_OF_BODIES, *_OF_MODELS, *_OF_ANSWERS), body, True, (reported,))


def _header(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "header", "schema": schema}


_RESET = Operation("Forget cached prefixes, of all callers.", "Forgotten", (400, 403, 503), parameters=({
    "name": "tiers",
    "in": "query",
    "description": f"Which ones, comma-separated: {', '.join(CACHE_TIERS)}. All of them if left out.",
    "schema": {"type": "string", "pattern": "^(device|host|disk)(,(device|host|disk))*$"},
},))  # fmt: skip
# By the name of the function that serves it.
OPERATIONS: Mapping[str, Operation] = {
    "chat": _generation("Answer a conversation.", "ChatCompletion", ChatBody),
    "complete": _generation("Go on with a text.", "Completion", CompletionBody),
    "message": _generation("Answer a conversation in Anthropic's form.", "Message", MessagesBody),
    "respond": _generation("Answer a conversation of items.", "Response", ResponsesBody),
    "count": Operation("Count the tokens of a conversation.", "TokenCount", (*_OF_BODIES, *_OF_MODELS), CountBody),
    "models": Operation("The one model, as a list.", "ModelList"),
    "model": Operation("The model.", "Model", _OF_MODELS, parameters=(
        {"name": "name", "in": "path", "required": True, "schema": TEXT},
    )),
    "health": Operation("Whether the engine lives.", "Health", (503,)),
    "ready": Operation("Whether requests would be served now.", "Ready", (503,)),
    "version": Operation("The version of the server.", "Version"),
    "metrics": Operation("Prometheus text.", None),
    "reset": _RESET,
    "start_profile": Operation("Begin to count what the engine does.", "ProfileStarted"),
    "stop_profile": Operation("What the engine did since.", "Profile", (400,)),
    "tokenize": Operation("Ids of a text or of a conversation.", "Tokens", (*_OF_BODIES, *_OF_MODELS), TokenizeBody),
    "detokenize": Operation("Text of ids.", "Text", (*_OF_BODIES, *_OF_MODELS), DetokenizeBody),
    "live": Operation("The data of the live page.", "Live"),
}  # fmt: skip


def api_document(routes: Iterable[BaseRoute], model: str, *, wants_key: bool) -> dict[str, Any]:
    """The document of an application's routes. `model` is the one name that requests may have."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            operation, path = OPERATIONS[route.name], route.path_format
            for method in route.methods or ():
                guarded = wants_key and not is_open(path)
                paths.setdefault(path, {})[method.lower()] = _described(operation, path, method, guarded=guarded)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    components: dict[str, Any] = {"schemas": {**_bodies(model), **PARTS, **ANSWERS}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "thalweg", "version": thalweg.__version__},
        "paths": paths,
        "components": components | ({"securitySchemes": schemes} if wants_key else {}),
    }


def _described(operation: Operation, path: str, method: str, *, guarded: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{method.lower()} {path}",
        "responses": _responses(operation, path, method, guarded=guarded),
    }
    if operation.parameters:
        fields["parameters"] = list(operation.parameters)
    if operation.body is not None:
        schema = ref(operation.body.__name__)
        fields["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return fields | ({"security": [{"bearer": []}, {"x-api-key": []}]} if guarded else {})


def _responses(operation: Operation, path: str, method: str, *, guarded: bool) -> dict[str, Any]:
    content: dict[str, Any] = {_TEXT_TYPE: {"schema": TEXT}}
    if operation.answer is not None:
        content = {"application/json": {"schema": ref(operation.answer)}}
    if operation.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    responses: dict[str, Any] = {"200": {"description": "The answer."}}
    if method != "HEAD":
        responses["200"]["content"] = content
    error = ref("AnthropicError" if path.startswith(MESSAGES_PATHS) else "Error")
    for status in sorted({*operation.errors, *((401,) if guarded else ())}):
        described: dict[str, Any] = {"description": HTTPStatus(status).phrase}
        responses[str(status)] = {**described, "content": {"application/json": {"schema": error}}}
    return responses


def _bodies(model: str) -> dict[str, Schema]:
    """The schemas of the bodies and of the models in them."""
    kinds = [operation.body for operation in OPERATIONS.values() if operation.body is not None]
    _, written = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    schemas: dict[str, Schema] = written["$defs"]
    for kind in kinds:
        properties = schemas[kind.__name__]["properties"]
        properties |= FIELDS.get(kind, {})
        properties |= dict.fromkeys(WITHOUT_EFFECT.get(kind.api, ()), ANYTHING)
        names = one_of_values(model, None)
        if issubclass(kind, CountBody):  # under /anthropic any such name means the model
            names = any_of(names, {"type": "string", "pattern": "^claude"})
        properties["model"] = names
    return schemas
