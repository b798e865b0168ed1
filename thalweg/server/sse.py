"""Server-sent events: data lines, progress comments while a prompt is computed, keep-alives in between."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from thalweg.errors import EngineError, ThalwegError
from thalweg.server.wire import error_fields
from thalweg.types import PrefillProgress

KEEP_ALIVE_SECONDS = 5.0
_PROGRESS_SECONDS = 0.5

Message = dict[str, Any] | PrefillProgress


def data_line(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Sends messages as they come; headers go out at once. `on_end` is called however it ends, even if the client was
    gone before the first byte, when the messages were never asked for."""

    def __init__(self, messages: AsyncGenerator[Message, None], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._lines = _lines(messages)
        super().__init__(self._lines, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await self._lines.aclose()  # a client that left while a line was being sent: nobody else ends it


async def _lines(messages: AsyncGenerator[Message, None]) -> AsyncGenerator[str, None]:
    """Data lines and comments. An error in mid-stream is sent as data: the status line is gone by then."""
    shown = 0.0
    pending = asyncio.ensure_future(_next(messages))
    try:
        yield ": accepted\n\n"
        while True:
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield ": keep-alive\n\n"
                continue
            message = pending.result()
            if message is None:
                break
            pending = asyncio.ensure_future(_next(messages))
            if not isinstance(message, PrefillProgress):
                yield data_line(message)
            elif time.monotonic() - shown >= _PROGRESS_SECONDS:
                shown = time.monotonic()
                yield f": prefill {message.done_tokens}/{message.prompt_tokens}\n\n"
        yield "data: [DONE]\n\n"
    except ThalwegError as error:
        yield data_line({"error": error_fields(error)})
    except Exception as error:
        yield data_line({"error": error_fields(EngineError(f"the stream failed: {error}"))})
        raise
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await messages.aclose()


async def _next(messages: AsyncGenerator[Message, None]) -> Message | None:
    return await anext(messages, None)
