"""Server-sent events: data lines, progress comments while a prompt is computed, keep-alives in between."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from thalweg.errors import EngineError, ThalwegError
from thalweg.server.wire import anthropic_error, error_fields
from thalweg.types import PrefillProgress

KEEP_ALIVE_SECONDS = 5.0
_PROGRESS_SECONDS = 0.5

Message = dict[str, Any] | PrefillProgress


def data_line(fields: dict[str, Any]) -> str:
    """A message without a name, as chat completions send it."""
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"


def event_line(fields: dict[str, Any]) -> str:
    """A message that is also an event named by its `type`, as Messages and Responses send it."""
    return f"event: {fields['type']}\n{data_line(fields)}"


@dataclass(frozen=True, slots=True)
class StreamForm:
    """What an API's streams look like. `pulse` gives what tells a client that a silent request is alive: a comment, or
    an event where the API has one, because some clients count only those."""

    line: Callable[[dict[str, Any]], str]
    error: Callable[[ThalwegError], str]
    pulse: Callable[[], str]
    end: str = ""


CHUNKS = StreamForm(
    line=data_line,
    error=lambda error: data_line({"error": error_fields(error)}),
    pulse=lambda: ": keep-alive\n\n",
    end="data: [DONE]\n\n",
)
MESSAGE_EVENTS = StreamForm(
    line=event_line,
    error=lambda error: event_line(anthropic_error(error)),
    pulse=lambda: event_line({"type": "ping"}),
)


class EventStream(StreamingResponse):
    """Sends messages as they come; headers go out at once. `on_end` is called however it ends, even if the client was
    gone before the first byte, when the messages were never asked for."""

    def __init__(
        self,
        messages: AsyncGenerator[Message, None],
        on_end: Callable[[], None],
        form: StreamForm = CHUNKS,
        headers: dict[str, str] | None = None,
    ) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._lines = _lines(messages, form)
        super().__init__(self._lines, media_type="text/event-stream", headers={**own, **(headers or {})})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await self._lines.aclose()  # a client that left while a line was being sent: nobody else ends it


async def _lines(messages: AsyncGenerator[Message, None], form: StreamForm) -> AsyncGenerator[str, None]:
    """Messages, pulses and comments. An error in mid-stream is sent as a message: the status line is gone by then."""
    shown = 0.0
    alive = time.monotonic()
    pending = asyncio.ensure_future(_next(messages))
    try:
        yield ": accepted\n\n"
        while True:
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
            now = time.monotonic()
            if not done or now - alive >= KEEP_ALIVE_SECONDS:
                alive = now
                yield form.pulse()
            if not done:
                continue
            message = pending.result()
            if message is None:
                break
            pending = asyncio.ensure_future(_next(messages))
            if not isinstance(message, PrefillProgress):
                alive = now
                yield form.line(message)
            elif now - shown >= _PROGRESS_SECONDS:
                shown = now
                yield f": prefill {message.done_tokens}/{message.prompt_tokens}\n\n"
        if form.end:
            yield form.end
    except ThalwegError as error:
        yield form.error(error)
    except Exception as error:
        yield form.error(EngineError(f"the stream failed: {error}"))
        raise
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await messages.aclose()


async def _next(messages: AsyncGenerator[Message, None]) -> Message | None:
    return await anext(messages, None)
