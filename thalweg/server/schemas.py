"""Request bodies: what is implemented, what is accepted because it cannot change the answer, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from thalweg.errors import RequestError, nearest
from thalweg.types import SamplingParams

# Fields of the public APIs that cannot change an answer here; accepted and without effect.
WITHOUT_EFFECT = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user", "user_id",
)  # fmt: skip
MOST_LOGPROBS = 20
MOST_CHOICES = 16
MOST_STOPS = 16
# The range of temperature is OpenAI's and DeepSeek's.
_Temperature = Annotated[float, Field(ge=0, le=2)]
_Share = Annotated[float, Field(gt=0, le=1)]
_MinP = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Count = Annotated[StrictInt, Field(ge=1)]
_FromZero = Annotated[StrictInt, Field(ge=0)]

_UNION_BRANCH = re.compile(r"(constrained-|nullable|function-)?(str|int|float|bool|list|dict|none)\b")

Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class Thinking(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["enabled", "disabled"]


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class SamplingBody(BaseModel):
    """Fields that chat completions and completions share."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    max_tokens: _Count | None = None
    temperature: _Temperature | None = None
    top_p: _Share | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: _MinP | None = None
    seed: StrictInt | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[_FromZero] | None = None
    min_tokens: _FromZero | None = None
    ignore_eos: StrictBool | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: StrictStr | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings, empty ones left out: they would stop every answer at once."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in given:
            raise RequestError("stop has an empty string", param="stop")
        return tuple(given)

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
        )


class ChatBody(SamplingBody):
    """POST /v1/chat/completions. Messages and tools are checked by the chat encoder."""

    messages: list[Any]
    max_completion_tokens: _Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: StrictStr | list[_FromZero] | list[StrictStr] | list[list[_FromZero]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None


class TokenizeBody(BaseModel):
    """POST /tokenize: a text, or a conversation."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Any] | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    tokens: list[_FromZero]


NESTED: Mapping[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "thinking": Thinking,
    "response_format": ResponseFormat,
}


def parse_body(kind: type[Body], fields: Any) -> Body:
    """Check a JSON body. Raises RequestError naming the first wrong field; an unknown one with its nearest match."""
    if not isinstance(fields, Mapping):
        raise RequestError("the body must be a JSON object", param=None)
    known = (*kind.model_fields, *WITHOUT_EFFECT)
    for name in fields:
        if name not in known:
            raise RequestError(f"{name} is not a supported field.{nearest(str(name), known)}", param=str(name))
    try:
        return kind.model_validate({k: v for k, v in fields.items() if k not in WITHOUT_EFFECT})
    except ValidationError as error:
        # Of the branches of a union, the one that got furthest says what the client meant.
        first = max(error.errors(), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
        path = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            nested = NESTED[str(first["loc"][0])].model_fields
            near = nearest(str(first["loc"][-1]), nested)
            raise RequestError(f"{path} is not a supported field.{near}", param=path) from error
        raise RequestError(f"{path}: {first['msg']}", param=path) from error


def _path(location: tuple[int | str, ...]) -> str:
    """The path in the client's body. pydantic also names the branch of a union that it tried: left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path or not _UNION_BRANCH.match(part):
            path += f".{part}" if path else part
    return path
