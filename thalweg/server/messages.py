"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a conversation."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from thalweg.server.chat import Conversation, encode_conversation, start_conversation
from thalweg.server.choices import close_all, collected, final_usages, merged
from thalweg.server.ending import Ending, ending_of, reader_of
from thalweg.server.generation import Piece
from thalweg.server.messages_input import CountBody, MessagesBody, to_chat
from thalweg.server.runs import Run, RunBegins, RunCutter, RunGoesOn, RunKind, Step
from thalweg.server.sealed import seal, sign
from thalweg.server.service import Service, new_call_id, new_id
from thalweg.server.sse import MESSAGE_EVENTS, EventStream, Message
from thalweg.types import Usage

Event = dict[str, Any]

# `malformed_tool_call` is not Anthropic's word: none of theirs says that the model wrote markup that is no call.
_STOP_REASONS: Mapping[Ending, str] = {
    Ending.STOP: "end_turn",
    Ending.STOP_STRING: "stop_sequence",
    Ending.LENGTH: "max_tokens",
    Ending.TOOL_CALLS: "tool_use",
    Ending.MALFORMED: "malformed_tool_call",
}


async def messages(service: Service, body: MessagesBody, request: Request) -> Response:
    """Answer one conversation."""
    _take_own_name(service, body, request)
    chat_body, origin = to_chat(body)
    message_id = new_id("msg")
    with origin.in_errors():
        conversation = await start_conversation(service, chat_body, request, message_id)
    writer = MessageWriter(message_id, service.runtime.model_name, conversation, omits_thinking=body.omits_thinking)
    headers = {"request-id": new_id("req"), **conversation.headers}
    if body.stream:
        generations = conversation.generations
        return EventStream(_stream(conversation, writer), lambda: close_all(generations), MESSAGE_EVENTS, headers)
    (pieces,) = await collected(request, conversation.generations)
    for piece in pieces:
        writer.push(piece)
    usages = final_usages([pieces])
    about = conversation.reporting.of_response(usages)
    return JSONResponse({**writer.message(), **about}, headers={**headers, **conversation.reporting.headers(usages)})


async def count_tokens(service: Service, body: CountBody, request: Request) -> Response:
    """How many tokens the prompt of a conversation has."""
    _take_own_name(service, body, request)
    service.check_model(body.model)
    chat_body, origin = to_chat(body)
    with origin.in_errors():
        prompt = await encode_conversation(service, chat_body)
    return JSONResponse({"input_tokens": len(prompt.token_ids)}, headers={"request-id": new_id("req")})


def _take_own_name(service: Service, body: CountBody, request: Request) -> None:
    """Under /anthropic every claude name means the one model here, as it does at DeepSeek; the answer has its name."""
    if request.url.path.startswith("/anthropic/") and (body.model or "").startswith("claude"):
        body.model = service.runtime.model_name


async def _stream(conversation: Conversation, writer: MessageWriter) -> AsyncGenerator[Message, None]:
    async with aclosing(merged(conversation.generations)) as pieces:
        async for _, piece in pieces:
            if piece.progress is not None:
                yield piece.progress
                continue
            about = conversation.reporting.of_chunk(piece.usage, last=piece.finish is not None)
            for event in writer.push(piece):
                yield event | about if event["type"] == "message_delta" else event


class MessageWriter:
    """Writes one answer as content blocks: as events while it comes, and as a whole message at its end."""

    def __init__(self, message_id: str, model: str, conversation: Conversation, *, omits_thinking: bool) -> None:
        self._generation = conversation.generations[0]
        self._omits_thinking = omits_thinking
        self._cutter = RunCutter()
        self._blocks: list[Event] = []
        self._call: Event = {}
        self._started = False
        self._message: Event = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._end: Event = {"stop_reason": None, "stop_sequence": None}
        self._usage: Event = {}

    def push(self, piece: Piece) -> list[Event]:
        """The events of a piece. The first one with usage starts the message: only then is known what was cached."""
        if piece.usage is not None:
            self._usage = _usage_fields(piece.usage, reader_of(self._generation).reasoning_tokens)
        events: list[Event] = []
        if not self._started:
            self._started = True
            usage = {**self._usage, "output_tokens": 0}
            events.append({"type": "message_start", "message": {**self.message(), "usage": usage}})
            events.append({"type": "ping"})
        events += self._events(self._cutter.push(piece.deltas))
        if piece.finish is not None:
            events += self._events(self._cutter.end())
            ending = ending_of(self._generation, piece.finish)
            stop = self._generation.stop_string if ending is Ending.STOP_STRING else None
            self._end = {"stop_reason": _STOP_REASONS[ending], "stop_sequence": stop}
            events.append({"type": "message_delta", "delta": self._end, "usage": self._usage})
            events.append({"type": "message_stop"})
        return events

    def message(self) -> Event:
        """The message so far; whole after the last piece."""
        return {**self._message, "content": list(self._blocks), **self._end, "usage": self._usage}

    def _events(self, steps: list[Step]) -> list[Event]:
        return [event for step in steps for event in self._step(step)]

    def _step(self, step: Step) -> list[Event]:
        index, run = {"index": step.run.index}, step.run
        if isinstance(step, RunBegins):
            if run.call is not None:
                self._call = {"type": "tool_use", "id": new_call_id(run.call.index), "name": run.call.name}
            return [{"type": "content_block_start", **index, "content_block": self._empty(run)}]
        if isinstance(step, RunGoesOn):
            delta = self._delta(run, step.text)
            return [{"type": "content_block_delta", **index, "delta": delta}] if delta else []
        block = self._block(run)
        self._blocks.append(block)
        events: list[Event] = [{"type": "content_block_stop", **index}]
        if run.kind is RunKind.REASONING:
            delta = {"type": "signature_delta", "signature": block["signature"]}
            events.insert(0, {"type": "content_block_delta", **index, "delta": delta})
        return events

    def _empty(self, run: Run) -> Event:
        if run.kind is RunKind.REASONING:
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""} if run.kind is RunKind.TEXT else {**self._call, "input": {}}

    def _delta(self, run: Run, text: str) -> Event | None:
        if run.kind is RunKind.REASONING:
            return None if self._omits_thinking else {"type": "thinking_delta", "thinking": text}
        if run.kind is RunKind.TEXT:
            return {"type": "text_delta", "text": text}
        return {"type": "input_json_delta", "partial_json": text}

    def _block(self, run: Run) -> Event:
        """A finished block. The signature of omitted thinking brings it back with the next turn."""
        if run.kind is RunKind.CALL:
            return {**self._call, "input": json.loads(run.text)}
        if run.kind is RunKind.TEXT:
            return {"type": "text", "text": run.text}
        if self._omits_thinking:
            return {"type": "thinking", "thinking": "", "signature": seal(run.text)}
        return {"type": "thinking", "thinking": run.text, "signature": sign(run.text)}


def _usage_fields(usage: Usage, thinking_tokens: int) -> Event:
    """input_tokens + cache_read_input_tokens = tokens of the prompt. Writing the cache costs no extra tokens here."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": thinking_tokens},
    }
