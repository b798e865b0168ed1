"""POST /v1/chat/completions: messages in; reasoning, content and tool calls out.

`start_conversation` is the way in for the other forms of a conversation too (Messages, Responses): they turn their
bodies into a ChatBody.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from thalweg.errors import RequestError, nearest
from thalweg.server.access import caller_of
from thalweg.server.cache_report import CacheReporting
from thalweg.server.choices import close_all, collected, expectations, final_usages, merged
from thalweg.server.ending import Ending, ending_of, reader_of
from thalweg.server.generation import Generation, Piece
from thalweg.server.output_rules import OutputWishes, offered_tools, read_output_format, read_tool_choice
from thalweg.server.schemas import ChatBody
from thalweg.server.service import LONG_TEXT, CacheSpace, Prompt, Service, new_call_id, new_id
from thalweg.server.sse import EventStream, Message
from thalweg.server.usage import chat_logprobs, usage_fields
from thalweg.text.chat import (
    ChatOptions,
    ChatPrompt,
    EncoderRevision,
    ReasoningEffort,
    encode_chat,
    read_effort,
)
from thalweg.text.deltas import ContentText, Delta, ReasoningText, ToolCallArguments, ToolCallStart, collect
from thalweg.text.parse import ChatParser
from thalweg.types import FinishReason, Usage

_THINKING_NAMES = ("thinking", "enable_thinking")
_TEMPLATE_NAMES = (*_THINKING_NAMES, "drop_thinking")


@dataclass(frozen=True, slots=True)
class Conversation:
    """An encoded conversation and the answers to it that the engine works on."""

    prompt: ChatPrompt
    generations: list[Generation]
    reporting: CacheReporting
    headers: dict[str, str]  # of any response


async def chat_completions(service: Service, body: ChatBody, request: Request) -> Response:
    """Answer one conversation with `n` choices."""
    response_id = new_id("chatcmpl")
    conversation = await start_conversation(service, body, request, response_id)
    answer = _Answer(service, body, response_id, conversation)
    generations = conversation.generations
    if body.stream:
        return EventStream(answer.stream(), lambda: close_all(generations), headers=conversation.headers)
    pieces = await collected(request, generations)
    headers = conversation.headers | conversation.reporting.headers(final_usages(pieces))
    return JSONResponse(answer.whole(pieces), headers=headers)


async def start_conversation(service: Service, body: ChatBody, request: Request, response_id: str) -> Conversation:
    """Encode a conversation and submit its `n` choices. Raises RequestError, and what `Engine.submit` raises."""
    service.check_model(body.model)
    logprobs, stops = body.wanted_logprobs(), body.stops()
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    reporting = CacheReporting.of(request, body.return_cache_report)
    cache = CacheSpace(caller_of(request), body.salt())
    wishes = output_wishes(body)
    encoded = await encode_conversation(service, body)
    rules = await service.output_rules.make(wishes, encoded.starts_in)
    tokenizer = service.runtime.tokenizer
    prompt = Prompt(np.array(encoded.token_ids, np.int32), encoded.boundaries, body.priority or 0)
    service.check_limits(cache.caller, [prompt], body.n or 1)
    generations: list[Generation] = []
    try:
        for choice in range(body.n or 1):
            max_tokens = body.max_completion_tokens or body.max_tokens
            sampling = body.sampling(max_tokens=max_tokens, logprobs=logprobs, choice=choice)
            parser = ChatParser(tokenizer, encoded.starts_in, spelled_marks=rules is None or rules.grammar is None)
            name = f"{response_id}-{choice}"
            generations.append(
                service.start(prompt, sampling, parser, request_id=name, stops=stops, cache=cache, rules=rules)
            )
    except BaseException:
        close_all(generations)
        raise
    return Conversation(encoded, generations, reporting, await expectations(generations))


def output_wishes(body: ChatBody) -> OutputWishes:
    """What the body says of the output. Raises RequestError naming the field."""
    last = body.messages[-1] if body.messages else None
    continues = isinstance(last, dict) and bool(last.get("prefix") or last.get("wo_eos")) and bool(last.get("content"))
    return OutputWishes(
        tools=offered_tools(body.tools, body.messages),
        tool_choice=body.tool_choice,
        several_calls=body.parallel_tool_calls is not False,
        response_format=read_output_format(body.response_format),
        thinking_budget=body.budget(),
        continues_content=continues,
    )


async def encode_conversation(service: Service, body: ChatBody) -> ChatPrompt:
    """The prompt of a chat body. Long conversations are encoded off the event loop."""
    options = _options(service, body)
    tokenizer = service.runtime.tokenizer

    def encode() -> ChatPrompt:
        return encode_chat([as_system(message) for message in body.messages], tokenizer, options)

    return await service.off_loop(_size([body.messages, body.tools]), encode)


def as_system(message: Any) -> Any:
    """OpenAI's `developer` role is its new word for system; V4's own developer turns come with tools of their own."""
    if isinstance(message, dict) and message.get("role") == "developer" and not message.get("tools"):
        return {**message, "role": "system"}
    return message


def _size(value: Any) -> int:
    """Values and characters of a JSON value (content, tool calls, schemas); counted no further than LONG_TEXT."""
    size, left = 0, [value]
    while left and size <= LONG_TEXT:
        part = left.pop()
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, (dict, list)):
            size += len(part)
            left.extend(part.values() if isinstance(part, dict) else part)
    return size


def _options(service: Service, body: ChatBody) -> ChatOptions:
    effort = body.reasoning_effort
    thinking = _thinking(service, body)
    drops = (body.chat_template_kwargs or {}).get("drop_thinking", True)
    return ChatOptions(
        thinking=thinking,
        reasoning_effort=ReasoningEffort.LOW if effort == "none" else read_effort(effort),
        revision=EncoderRevision(service.runtime.chat_encoding),
        drop_thinking=drops,
        tools=body.tools or None,
        response_format=body.response_format,
        tool_choice=read_tool_choice(body.tool_choice, offered_tools(body.tools, body.messages))[0],
    )


def _thinking(service: Service, body: ChatBody) -> bool:
    """Whether the model thinks: DeepSeek's field, vLLM's template arguments, effort `none`, or the model's default."""
    wishes = set()
    for name, value in (body.chat_template_kwargs or {}).items():
        path = f"chat_template_kwargs.{name}"
        if name not in _TEMPLATE_NAMES:
            raise RequestError(f"{path} is not supported.{nearest(name, _TEMPLATE_NAMES)}", param=path)
        if not isinstance(value, bool):
            raise RequestError(f"{path} must be true or false", param=path)
        if name in _THINKING_NAMES:
            wishes.add(value)
    if body.thinking is not None:
        wishes.add(body.thinking.type == "enabled")
    if body.reasoning_effort == "none":
        wishes.add(False)
    if len(wishes) > 1:
        raise RequestError("the request both enables and disables thinking", param="thinking")
    return wishes.pop() if wishes else service.runtime.default_thinking


class _Answer:
    """Chunks and the whole response of one request."""

    def __init__(
        self,
        service: Service,
        body: ChatBody,
        response_id: str,
        conversation: Conversation,
    ) -> None:
        self._service = service
        self._body = body
        self._generations = conversation.generations
        self._choices = [_Choice(conversation.prompt.thinking) for _ in conversation.generations]
        self._options = body.stream_options
        self._reporting = conversation.reporting
        self._common = {"id": response_id, "created": int(time.time()), "model": service.runtime.model_name}

    def whole(self, pieces: list[list[Piece]]) -> dict[str, Any]:
        choices, usages = [], final_usages(pieces)
        for index, own in enumerate(pieces):
            choice = self._choices[index]
            parsed = collect([delta for piece in own for delta in piece.deltas])
            message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
            if parsed.reasoning or choice.thinking:
                message["reasoning_content"] = parsed.reasoning
            if parsed.tool_calls:
                message["content"] = parsed.content or None
                message["tool_calls"] = [_call(i, c.name, c.arguments) for i, c in enumerate(parsed.tool_calls)]
            finish = self._finish(index, own[-1].finish)
            logprobs = self._logprobs([token for piece in own for token in piece.tokens])
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
        about = {"usage": self._usage(usages), **self._reporting.of_response(usages)}
        return {**self._common, "object": "chat.completion", "choices": choices, **about}

    async def stream(self) -> AsyncGenerator[Message, None]:
        usages: dict[int, Usage] = {}
        async with aclosing(merged(self._generations)) as pieces:
            async for index, piece in pieces:
                if piece.progress is not None:
                    yield piece.progress
                if piece.usage is not None:
                    usages[index] = piece.usage
                for chunk in self._chunks(index, piece, list(usages.values())):
                    yield chunk
        if self._options and self._options.include_usage:
            yield self._chunk([]) | {"usage": self._usage([usages[i] for i in sorted(usages)])}

    def _chunks(self, index: int, piece: Piece, usages: list[Usage]) -> list[dict[str, Any]]:
        """One chunk per delta; log-probabilities and the finish reason go with the last one."""
        if piece.progress is not None:
            return []
        choice = self._choices[index]
        shown = [choice.delta(delta) for delta in piece.deltas]
        deltas = [fields for fields in shown if fields] or [{}]
        logprobs = self._logprobs(list(piece.tokens))
        if deltas == [{}] and piece.finish is None and not (logprobs and piece.tokens) and choice.role_sent:
            return []
        if not choice.role_sent:
            deltas[0] = {"role": "assistant", "content": "", **deltas[0]}
            choice.role_sent = True
        finish = self._finish(index, piece.finish)
        last = len(deltas) - 1
        continuous = self._options is not None and self._options.continuous_usage_stats
        usage = {"usage": self._usage(usages)} if continuous else {}
        return [
            usage | self._reporting.of_chunk(piece.usage, last=finish is not None and place == last) | self._chunk([{
                "index": index,
                "delta": fields,
                "logprobs": logprobs if place == last else None,
                "finish_reason": finish if place == last else None,
            }])
            for place, fields in enumerate(deltas)
        ]  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk", "choices": choices}

    def _finish(self, index: int, finish: FinishReason | None) -> str | None:
        """`tool_calls` where the answer ends with complete calls; `malformed_tool_call` where markup was no call."""
        if finish is None:
            return None
        ending = ending_of(self._generations[index], finish)
        return "stop" if ending is Ending.STOP_STRING else ending.value

    def _logprobs(self, tokens: list[Any]) -> dict[str, Any] | None:
        return chat_logprobs(self._service.runtime.tokenizer, tokens) if self._body.logprobs else None

    def _usage(self, usages: list[Usage]) -> dict[str, Any]:
        return usage_fields(usages, sum(reader_of(own).reasoning_tokens for own in self._generations))


class _Choice:
    """What has been sent of one choice."""

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self.role_sent = False

    def delta(self, delta: Delta) -> dict[str, Any]:
        """A streamed delta in OpenAI's form, with DeepSeek's reasoning_content."""
        if isinstance(delta, ReasoningText):
            return {"reasoning_content": delta.text}
        if isinstance(delta, ContentText):
            return {"content": delta.text}
        if isinstance(delta, ToolCallStart):
            return {"tool_calls": [{"index": delta.index, **_call(delta.index, delta.name, "")}]}
        if isinstance(delta, ToolCallArguments):
            return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
        return {}


def _call(index: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": new_call_id(index), "type": "function", "function": function}
