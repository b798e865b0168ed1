"""Request bodies: what is implemented, what is accepted because it cannot change the answer, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic_core import ErrorDetails

from thalweg.errors import RequestError, nearest
from thalweg.types import SamplingParams

_OPENAI = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip
# Top-level fields of each public API that cannot change an answer here; accepted and without effect.
WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "chat": tuple(name for name in _OPENAI if name != "parallel_tool_calls"),
    "completions": _OPENAI,
    "messages": (
        "cache_control", "diagnostics", "inference_geo", "metadata", "service_tier", "speed", "user_profile_id",
        "workspace_id",
    ),
    "responses": (
        "client_metadata", "max_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
    ),
}  # fmt: skip
MOST_LOGPROBS = 20
MOST_CHOICES = 16
MOST_STOPS = 16
MOST_BIAS = 100
# The range of temperature is OpenAI's and DeepSeek's.
Temperature = Annotated[float, Field(ge=0, le=2, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
_MinP = Annotated[float, Field(ge=0, le=1, strict=True)]
_Penalty = Annotated[float, Field(ge=-2, le=2, strict=True)]
_Repetition = Annotated[float, Field(gt=0, le=10, strict=True)]
Count = Annotated[StrictInt, Field(ge=1)]
_FromZero = Annotated[StrictInt, Field(ge=0)]
# The first wrong entry is enough: an error for every entry of a list of millions would take gigabytes.
_Ids = Annotated[list[_FromZero], Field(fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
_IdLists = Annotated[list[_Ids], Field(fail_fast=True)]

_WORDS = {
    "missing": "is required",
    "bool_type": "must be a boolean",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "float_type": "must be a number",
    "int_type": "must be an integer",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_long": "has {actual_length} entries; at most {max_length} are allowed",
}
_UNION_BRANCH = re.compile(r"(constrained-|nullable|function-)?(str|int|float|bool|list|dict|none)\b")

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

Body = TypeVar("Body", bound="ApiBody")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class Thinking(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["enabled", "disabled"]
    budget_tokens: _FromZero | None = None


class ApiBody(BaseModel):
    """A request body. `api` names its list in WITHOUT_EFFECT."""

    model_config = ConfigDict(extra="forbid")
    api: ClassVar[str] = ""


class SamplingBody(ApiBody):
    """Fields that chat completions and completions share."""

    model: StrictStr | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: _MinP | None = None
    seed: StrictInt | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: _Repetition | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: _Ids | None = None
    min_tokens: _FromZero | None = None
    ignore_eos: StrictBool | None = None
    logit_bias: dict[str, Any] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: StrictStr | None = None
    user_id: StrictStr | None = None
    return_cache_report: StrictBool | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings, empty ones left out: they would stop every answer at once."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in given:
            raise RequestError("stop has an empty string", param="stop")
        return tuple(given)

    def salt(self) -> str:
        """What divides the tenant's cache further: cache_salt, and the user_id by which DeepSeek's API divides its own.

        A list in JSON, because no pair may look like another; empty where neither is given.
        """
        return json.dumps([self.cache_salt or "", self.user_id or ""]) if self.cache_salt or self.user_id else ""

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, choice: int) -> SamplingParams:
        """Sampling of choice number `choice`: each has a seed of its own."""
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is above max_tokens {max_tokens}", param="min_tokens")
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else self.seed + choice,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            logit_bias=tuple(_bias(token, bias) for token, bias in (self.logit_bias or {}).items()),
        )


def _bias(token: str, bias: Any) -> tuple[int, float]:
    """One entry of logit_bias. The engine checks the id against the vocabulary."""
    path = f"logit_bias.{token:.40}"
    if not _TOKEN_ID.fullmatch(token):
        raise RequestError(f"{path} must be a token id in decimal digits", param=path)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MOST_BIAS <= bias <= MOST_BIAS:
        raise RequestError(f"{path} must be a number from -{MOST_BIAS} to {MOST_BIAS}", param=path)
    return int(token), float(bias)


class ChatBody(SamplingBody):
    """POST /v1/chat/completions. The chat encoder checks messages and tools, output_rules the choice and the format."""

    api: ClassVar[str] = "chat"
    messages: list[Any]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None
    response_format: Any = None
    thinking: Thinking | None = None
    thinking_budget: _FromZero | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def budget(self) -> int | None:
        """How many tokens the thinking may have, in either spelling; None for as many as the answer."""
        other = self.thinking.budget_tokens if self.thinking else None
        if other is not None and self.thinking is not None and self.thinking.type == "disabled":
            raise RequestError("thinking.budget_tokens needs thinking.type 'enabled'", param="thinking.budget_tokens")
        if None not in (other, self.thinking_budget) and other != self.thinking_budget:
            raise RequestError("thinking_budget and thinking.budget_tokens differ", param="thinking_budget")
        return self.thinking_budget if other is None else other

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SamplingBody):
    """POST /v1/completions. With `suffix` the model writes what belongs between the two (DeepSeek's FIM)."""

    api: ClassVar[str] = "completions"
    prompt: StrictStr | _Ids | Texts | _IdLists
    suffix: StrictStr | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: StrictBool | None = None
    best_of: Count | None = None


class TokenizeBody(ApiBody):
    """POST /tokenize: a text, or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Any] | None = None


class DetokenizeBody(ApiBody):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: _Ids


def parse_body(kind: type[Body], fields: Any) -> Body:
    """Check a JSON body. Raises RequestError naming the first wrong field; an unknown one with its nearest match."""
    if not isinstance(fields, Mapping):
        raise RequestError("the body must be a JSON object", param=None)
    ignored = WITHOUT_EFFECT.get(kind.api, ())
    known = (*kind.model_fields, *ignored)
    for name in fields:
        if name not in known:
            raise RequestError(f"{name} is not a supported field.{nearest(str(name), known)}", param=str(name))
    try:
        return kind.model_validate({k: v for k, v in fields.items() if k not in ignored})
    except ValidationError as error:
        raise _named(kind, error.errors(include_url=False)) from error


def _named(kind: type[BaseModel], errors: list[ErrorDetails]) -> RequestError:
    """The error of the wrong field. Of the branches of a union, the one that got furthest says what was meant."""
    furthest = max(map(_progress, errors))
    reached = [error for error in errors if _progress(error) == furthest]
    first = reached[0]
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _model_at(kind, first["loc"]).model_fields
        near = nearest(str(first["loc"][-1]), known) or f" Supported: {', '.join(known)}."
        return RequestError(f"{path} is not a supported field.{near}", param=path)
    words = dict.fromkeys(_words(error) for error in reached if _path(error["loc"]) == path)
    return RequestError(f"{path} {' or '.join(words).replace(' or must be ', ' or ')}", param=path)


def _model_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that has no field of the location's last name."""
    for part in location[:-1]:
        field = kind.model_fields.get(str(part))
        kind = (field and _model_in(field.annotation)) or kind
    return kind


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _progress(error: ErrorDetails) -> tuple[int, int, bool]:
    """How far a branch got: depth, place in a list, and the right type there but a wrong value."""
    place = max((part for part in error["loc"] if isinstance(part, int)), default=-1)
    return len(error["loc"]), place, not error["type"].endswith("_type")


def _words(error: ErrorDetails) -> str:
    return _WORDS.get(error["type"], error["msg"]).format_map(error.get("ctx", {}))


def _path(location: tuple[int | str, ...]) -> str:
    """The path in the client's body. pydantic also names the branch of a union that it tried: left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path or not _UNION_BRANCH.match(part):
            path += f".{part}" if path else part
    return path
