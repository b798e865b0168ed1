"""Signs of life of a stream whose prompt takes long, in the form of each API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from thalweg.errors import EngineError
from thalweg.server import sse
from thalweg.server.sse import CHUNKS, MESSAGE_EVENTS, EventStream, Message, StreamForm, event_line
from thalweg.types import PrefillProgress


async def late(progress: bool, fails: bool = False) -> AsyncGenerator[Message, None]:
    """A message after a while, in which there is progress or silence."""
    for done in range(6):
        await asyncio.sleep(0.02)
        if progress:
            yield PrefillProgress("r", done, 6)
    if fails:
        raise EngineError("no luck")
    yield {"type": "answer"}


def streamed(form: StreamForm, progress: bool, fails: bool = False) -> list[str]:
    async def run() -> list[str]:
        stream = EventStream(late(progress, fails), lambda: None, form)
        return [str(line) async for line in stream.body_iterator]

    return asyncio.run(run())


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize(
    ("form", "sign"),
    [(CHUNKS, ": keep-alive\n\n"), (MESSAGE_EVENTS, 'event: ping\ndata: {"type":"ping"}\n\n')],
)
def test_signs_of_life(form: StreamForm, sign: str, progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.03)
    monkeypatch.setattr(sse, "_PROGRESS_SECONDS", 0.0)
    lines = streamed(form, progress)
    assert lines[0] == ": accepted\n\n" and lines.count(sign) >= 2
    assert (": prefill 3/6\n\n" in lines) is progress
    after = lines[lines.index(form.line({"type": "answer"})) + 1 :]
    assert after == (["data: [DONE]\n\n"] if form is CHUNKS else [])


def test_a_form_says_its_own_error() -> None:
    own = StreamForm(event_line, lambda error: event_line({"type": "failed", "why": error.message}), lambda: "")
    assert streamed(own, progress=False, fails=True)[-1] == event_line({"type": "failed", "why": "no luck"})
    assert '"type":"api_error"' in streamed(MESSAGE_EVENTS, progress=False, fails=True)[-1]
    assert '"type":"engine_error"' in streamed(CHUNKS, progress=False, fails=True)[-1]
