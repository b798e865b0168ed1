"""POST /v1/responses: OpenAI's item form of a conversation, whole or as semantic events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from thalweg.errors import ThalwegError
from thalweg.server.chat import Conversation, start_conversation
from thalweg.server.choices import close_all, collected, final_usages, merged
from thalweg.server.ending import Ending, ending_of, reader_of
from thalweg.server.generation import Piece
from thalweg.server.responses_input import ResponsesBody, to_chat
from thalweg.server.responses_tools import Toolbox, ToolName, custom_input
from thalweg.server.runs import Run, RunBegins, RunCutter, RunGoesOn, RunKind, Step
from thalweg.server.sealed import seal
from thalweg.server.service import Service, new_call_id, new_id
from thalweg.server.sse import EventStream, Message, StreamForm, event_line
from thalweg.types import Usage

Event = dict[str, Any]

# Why an answer is incomplete; an answer with tool markup that is no call is not complete either.
_INCOMPLETE = {Ending.LENGTH: "max_output_tokens", Ending.MALFORMED: Ending.MALFORMED.value}


async def responses(service: Service, body: ResponsesBody, request: Request) -> Response:
    """Answer one conversation."""
    chat_body, toolbox, origin = to_chat(body)
    response_id = new_id("resp")
    with origin.in_errors():
        conversation = await start_conversation(service, chat_body, request, response_id)
    writer = ResponseWriter(response_id, service.runtime.model_name, body, toolbox, conversation)
    generations = conversation.generations
    if body.stream:
        form = StreamForm(
            line=event_line,
            error=lambda error: event_line(writer.failed(error)),
            pulse=lambda: event_line(writer.in_progress()),
        )
        return EventStream(_stream(conversation, writer), lambda: close_all(generations), form, conversation.headers)
    (pieces,) = await collected(request, generations)
    for piece in pieces:
        writer.push(piece)
    return JSONResponse(
        writer.response(), headers=conversation.headers | conversation.reporting.headers(final_usages([pieces]))
    )


async def _stream(conversation: Conversation, writer: ResponseWriter) -> AsyncGenerator[Message, None]:
    yield writer.created()
    yield writer.in_progress()
    async with aclosing(merged(conversation.generations)) as pieces:
        async for _, piece in pieces:
            if piece.progress is not None:
                yield piece.progress
            for event in writer.push(piece):
                yield event


@dataclass(frozen=True, slots=True)
class _Item:
    """What an output item is called; calls also have an id for their output."""

    item_id: str
    call_id: str = ""
    tool: ToolName | None = None


class ResponseWriter:
    """Writes one answer as output items: as events while it comes, and as a whole response at its end."""

    def __init__(
        self, response_id: str, model: str, body: ResponsesBody, toolbox: Toolbox, conversation: Conversation
    ) -> None:
        self._generation = conversation.generations[0]
        self._reporting = conversation.reporting
        self._seals = "reasoning.encrypted_content" in (body.include or [])
        self._toolbox = toolbox
        self._cutter = RunCutter()
        self._item = _Item("")
        self._sequence = 0
        self._usage: Usage | None = None
        self._status: Event = {"status": "in_progress", "error": None, "incomplete_details": None}
        self._output: list[Event] = []
        self._response: Event = {"id": response_id, "object": "response", "created_at": int(time.time())}
        self._response |= {"model": model, **_echo(body)}

    def created(self) -> Event:
        """The first event."""
        return self._event("response.created", response=self.response())

    def in_progress(self) -> Event:
        """The second event, and a sign of life while a long prompt is computed."""
        return self._event("response.in_progress", response=self.response())

    def failed(self, error: ThalwegError) -> Event:
        """The last event where the engine failed the request."""
        code = "server_error" if error.status >= 500 else error.kind
        self._status = {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("response.failed", response={**self.response(), "incomplete_details": None})

    def push(self, piece: Piece) -> list[Event]:
        """The events of a piece."""
        self._usage = piece.usage or self._usage
        events = self._events(self._cutter.push(piece.deltas), "completed")
        if piece.finish is None:
            return events
        reason = _INCOMPLETE.get(ending_of(self._generation, piece.finish))
        status = "completed" if reason is None else "incomplete"
        events += self._events(self._cutter.end(), status)
        self._status = {"status": status, "error": None, "incomplete_details": reason and {"reason": reason}}
        self._status |= {"completed_at": int(time.time())} if reason is None else {}
        return [*events, self._event(f"response.{status}", response=self.response())]

    def response(self) -> Event:
        """The response so far; whole after the last piece."""
        usage = (
            None if self._usage is None else _usage_fields(self._usage, reader_of(self._generation).reasoning_tokens)
        )
        ended = self._usage is not None and self._status["status"] != "in_progress"
        about = self._reporting.of_response([self._usage]) if self._usage is not None and ended else {}
        shown = {"output": list(self._output), "usage": usage if ended else None}
        return {**self._response, **self._status, **shown, **about}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _events(self, steps: list[Step], status: str) -> list[Event]:
        """`status` is that of an item that ends."""
        events = []
        for step in steps:
            if isinstance(step, RunBegins):
                events += self._begin(step.run)
            elif isinstance(step, RunGoesOn):
                events += self._delta(step.run, step.text)
            else:
                events += self._end(step.run, status)
        return events

    def _begin(self, run: Run) -> list[Event]:
        if run.call is not None:
            tool = self._toolbox.name_of(run.call.name)
            self._item = _Item(new_id("ctc" if tool.custom else "fc"), new_call_id(run.call.index), tool)
        else:
            self._item = _Item(new_id("rs" if run.kind is RunKind.REASONING else "msg"))
        item = self._fields(run, "in_progress")
        events = [self._event("response.output_item.added", output_index=run.index, item=item)]
        if run.kind is not RunKind.CALL:
            events.append(self._event("response.content_part.added", **self._place(run), part=_part(run)))
        return events

    def _delta(self, run: Run, text: str) -> list[Event]:
        """A custom tool's input is known at the end of its call: until then it is JSON."""
        if self._item.tool is not None and self._item.tool.custom:
            return []
        logprobs: Event = {"logprobs": []} if run.kind is RunKind.TEXT else {}
        return [self._event(f"{_event_name(run)}.delta", **self._place(run), delta=text, **logprobs)]

    def _end(self, run: Run, status: str) -> list[Event]:
        item = self._fields(run, status)
        self._output.append(item)
        place = self._place(run)
        if self._item.tool is not None and self._item.tool.custom:
            name = "response.custom_tool_call_input"
            events = [self._event(f"{name}.delta", **place, delta=item["input"])]
            events.append(self._event(f"{name}.done", **place, input=item["input"]))
        elif run.kind is RunKind.CALL:
            events = [self._event(f"{_event_name(run)}.done", **place, name=item["name"], arguments=run.text)]
        else:
            logprobs: Event = {"logprobs": []} if run.kind is RunKind.TEXT else {}
            events = [self._event(f"{_event_name(run)}.done", **place, text=run.text, **logprobs)]
            events.append(self._event("response.content_part.done", **place, part=_part(run)))
        return [*events, self._event("response.output_item.done", output_index=run.index, item=item)]

    def _place(self, run: Run) -> Event:
        place = {"item_id": self._item.item_id, "output_index": run.index}
        return place if run.kind is RunKind.CALL else {**place, "content_index": 0}

    def _fields(self, run: Run, status: str) -> Event:
        """The item, empty while it is in progress."""
        common: Event = {"id": self._item.item_id, "status": status}
        begun = status == "in_progress"
        if run.kind is RunKind.TEXT:
            content = [] if begun else [_part(run)]
            return {"type": "message", **common, "role": "assistant", "content": content}
        if run.kind is RunKind.REASONING:
            content = [] if begun else [_part(run)]
            sealed = {"encrypted_content": seal(run.text)} if self._seals and not begun else {}
            return {"type": "reasoning", **common, "summary": [], "content": content, **sealed}
        tool = self._item.tool
        assert tool is not None, "a call has a tool"
        named: Event = {"call_id": self._item.call_id, "name": tool.name}
        named |= {} if tool.namespace is None else {"namespace": tool.namespace}
        if tool.custom:
            return {"type": "custom_tool_call", **common, **named, "input": "" if begun else custom_input(run.text)}
        return {"type": "function_call", **common, **named, "arguments": run.text}


def _event_name(run: Run) -> str:
    if run.kind is RunKind.REASONING:
        return "response.reasoning_text"
    return "response.output_text" if run.kind is RunKind.TEXT else "response.function_call_arguments"


def _part(run: Run) -> Event:
    """The one content part of a text or of reasoning, as far as it is written."""
    if run.kind is RunKind.REASONING:
        return {"type": "reasoning_text", "text": run.text}
    return {"type": "output_text", "text": run.text, "annotations": [], "logprobs": []}


def _echo(body: ResponsesBody) -> Event:
    """The request's settings, as responses repeat them."""
    reasoning, form = body.reasoning, body.text and body.text.format
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": shown},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p or 1.0,
        "truncation": "disabled",
    }


def _usage_fields(usage: Usage, reasoning_tokens: int) -> Event:
    """Cached tokens are part of the input. Writing the cache costs no extra tokens here."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }
