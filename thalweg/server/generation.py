"""One engine request as the server sees it: tokens become text on the event loop, stop strings and clients end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from thalweg.errors import EngineError, ThalwegError
from thalweg.server.record import RequestRecord
from thalweg.text.deltas import ContentText, Delta
from thalweg.text.stream import StopMatcher, TokenStream
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import (
    CacheReport,
    Event,
    FinishReason,
    GenerateRequest,
    PrefillProgress,
    Queued,
    SampledToken,
    TokenEvent,
    Usage,
)


class EngineHandle(Protocol):
    """What the server needs of an engine."""

    def submit(self, request: GenerateRequest, listener: Callable[[Event], None]) -> None: ...

    def cancel(self, request_id: str) -> None: ...


class OutputReader(Protocol):
    """Reads one output token by token into what a client is shown."""

    def push(self, token: int) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class PlainReader:
    """Everything is content: for completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = TokenStream(tokenizer)

    def push(self, token: int) -> list[Delta]:
        text = self._stream.push(token)
        return [ContentText(text)] if text else []

    def finish(self) -> list[Delta]:
        text = self._stream.flush()
        return [ContentText(text)] if text else []


@dataclass(frozen=True, slots=True)
class Piece:
    """News of a request: what may be shown, the tokens behind it, and at the end why it ended.

    `tokens` excludes the end-of-sequence token. `progress` is set, alone, while the prompt is computed.
    """

    deltas: tuple[Delta, ...]
    tokens: tuple[SampledToken, ...]
    usage: Usage | None
    finish: FinishReason | None = None
    progress: PrefillProgress | None = None

    @property
    def text(self) -> str:
        """The content among the deltas."""
        return "".join(delta.text for delta in self.deltas if isinstance(delta, ContentText))


class Generation:
    """A submitted request. Iterate over `pieces`, and call `close` however that ends.

    Stop strings are looked for in the content, once min_tokens are produced.
    """

    def __init__(
        self,
        engine: EngineHandle,
        request: GenerateRequest,
        reader: OutputReader,
        stops: tuple[str, ...],
        record: RequestRecord,
        on_served: Callable[[CacheReport], None],
    ) -> None:
        """Submits at once: raises what `Engine.submit` raises. `on_served` hears of an end that is no failure."""
        self.request = request
        self.reader = reader
        self._engine = engine
        self._record = record
        self._on_served = on_served
        self._produced = 0
        self._stop = StopMatcher(stops, lambda: self._produced >= request.sampling.min_tokens)
        self._ended = False
        self.expected_seconds: float | None = None  # to the first token, as it was estimated when the engine took it in
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._early: list[Event] = []  # an event that came while another was waited for
        loop = asyncio.get_running_loop()
        engine.submit(request, lambda event: _pass_on(loop, self._events, event))

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the content, if one did."""
        return self._stop.matched

    async def taken_in(self, patience: float) -> None:
        """Wait until the engine has taken the request in, or so many seconds. Raises what it was refused with."""
        try:
            event = await asyncio.wait_for(self._events.get(), patience)
        except TimeoutError:  # in the middle of a long step: whatever comes is told in the stream
            return
        if isinstance(event, Queued):
            self.expected_seconds = event.expected_seconds
        elif isinstance(event, TokenEvent) and event.error is not None:
            self._piece(event)
        else:
            self._early.append(event)

    def close(self) -> None:
        """Stop the engine's work on this request if it is not over: nobody waits for it any more."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self.request.request_id)
            self._record.abandoned()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces until one has `finish`. Raises the request's ThalwegError if the engine failed it."""
        while not self._ended:
            event = self._early.pop() if self._early else await self._events.get()
            if isinstance(event, Queued):  # nobody waited for it, or not long enough
                event = await self._events.get()
            if isinstance(event, PrefillProgress):
                self._record.progressed(event)
                yield Piece((), (), None, progress=event)
            elif isinstance(event, TokenEvent):
                yield self._piece(event)

    def _piece(self, event: TokenEvent) -> Piece:
        if event.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
            self._end(event.finish, event.usage, event.error)
            raise event.error or EngineError("the engine ended the request without a reason")
        self._record.produced(len(event.tokens), event.usage)
        deltas, tokens = self._read(event)
        usage, finish = event.usage, event.finish
        if self._stop.matched is not None:
            self._engine.cancel(self.request.request_id)
            usage, finish = replace(usage, output_tokens=self._produced), FinishReason.STOP
        elif finish is not None:
            deltas += self._shown(self.reader.finish())
            rest = self._stop.flush()
            deltas += [ContentText(rest)] if rest else []
        if finish is not None:
            self._end(finish, usage)
            self._on_served(usage.cache)
        return Piece(tuple(deltas), tokens, usage, finish)

    def _read(self, event: TokenEvent) -> tuple[list[Delta], tuple[SampledToken, ...]]:
        """What the event's tokens make visible, and those tokens; the one that ended the request is not text."""
        deltas: list[Delta] = []
        kept = []
        for place, sampled in enumerate(event.tokens):
            self._produced += 1
            final = event.finish is FinishReason.STOP and place == len(event.tokens) - 1
            if not final and self._stop.matched is None:
                deltas += self._shown(self.reader.push(sampled.token))
                kept.append(sampled)
        return deltas, tuple(kept)

    def _shown(self, deltas: list[Delta]) -> list[Delta]:
        """Deltas with their content cut before a stop string; nothing after one."""
        shown: list[Delta] = []
        for delta in deltas:
            if self._stop.matched is not None:
                break
            if isinstance(delta, ContentText):
                delta = ContentText(self._stop.push(delta.text))
            if not isinstance(delta, ContentText) or delta.text:
                shown.append(delta)
        return shown

    def _end(self, reason: FinishReason, usage: Usage, error: ThalwegError | None = None) -> None:
        self._ended = True
        self._record.ended(reason.value, usage, error)


def _pass_on(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """From the engine thread to the event loop; after shutdown of the loop nobody listens any more."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
