"""Answers that a random model would never give: reasoning, tool calls and broken markup, through the real endpoint.

Everything is real but the runner, which says chosen tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from typing import Any

import httpx
import pytest

from tests.engine.assembly import CountingRunner, Models, Shape, engine_of
from tests.model.fields import FLASH_LIKE
from thalweg.config.options import load_options
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.errors import CancelledError
from thalweg.server.app import create_app
from thalweg.server.generation import Generation, PlainReader
from thalweg.server.service import Service
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import SampledToken, SamplingParams

_CONTROL = re.compile("(<｜[^｜]*｜>|</?think>|｜DSML｜)")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Oslo "x"</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="time">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


class Script:
    """A runner whose every request says the same text, then end of sentence."""

    def __init__(self, tokenizer: Tokenizer, text: str, fail_after: int | None = None) -> None:
        ids: list[int] = []
        for place, piece in enumerate(_CONTROL.split(text)):
            ids += [tokenizer.special_id(piece)] if place % 2 else tokenizer.encode_text(piece)
        self._ids = [*ids, tokenizer.eos_id]
        self._fail_after = fail_after

    def run(self, plan: StepPlan) -> StepResult:
        sampled = {}
        for item in plan.sequences:
            done = item.running.sequence.output_tokens
            if self._fail_after is not None and done >= self._fail_after:
                raise RuntimeError("injected failure")
            if item.samples:
                sampled[item.request_id] = SampledToken(self._ids[min(done, len(self._ids) - 1)])
        return StepResult(sampled)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return build_runtime(load_options({"kv_cache_memory": "64MiB"}, environment={}))


def exchange(runtime: Runtime, text: str, path: str, body: dict[str, Any], fail_after: int | None = None) -> list[Any]:
    """The responses to a body, whole and streamed, of a server whose model says `text`."""

    async def run() -> list[httpx.Response]:
        _, plan = Models().runner(FLASH_LIKE, Shape())
        fields_of_model = {**FLASH_LIKE, "vocab_size": runtime.model_config.vocab_size}
        engine = engine_of(fields_of_model, Script(runtime.tokenizer, text, fail_after), plan, Shape())
        app = create_app(Service(dataclasses.replace(runtime, engine=engine)))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            try:
                return [await client.post(path, json={**body, "stream": stream}) for stream in (False, True)]
            finally:
                engine.close()

    return asyncio.run(run())


def ask(runtime: Runtime, text: str, fail_after: int | None = None, **fields: Any) -> tuple[dict, list[dict]]:
    """The whole answer, and the chunks of the same answer streamed."""
    body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 500, **fields}
    whole, streamed = exchange(runtime, text, "/v1/chat/completions", body, fail_after)
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    return whole.json(), [json.loads(line) for line in lines if line != "[DONE]"]


def joined(chunks: list[dict]) -> dict[str, Any]:
    """What a client makes of the chunks."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                assert call["id"] and call["type"] == "function"
            message["tool_calls"][call["index"]]["arguments"] += call["function"].get("arguments", "")
    message["finish_reason"] = chunks[-1]["choices"][0]["finish_reason"]
    return message


def test_reasoning_then_content(runtime: Runtime) -> None:
    thinking = {"thinking": {"type": "enabled"}}
    whole, chunks = ask(runtime, "I wonder.\n</think>It is 42.", **thinking)
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == "I wonder.\n" and message["content"] == "It is 42."
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert 0 < whole["usage"]["completion_tokens_details"]["reasoning_tokens"] < whole["usage"]["completion_tokens"]
    seen = joined(chunks)
    assert (seen["reasoning_content"], seen["content"]) == ("I wonder.\n", "It is 42.")
    assert seen["finish_reason"] == "stop"


def test_tool_calls(runtime: Runtime) -> None:
    whole, chunks = ask(runtime, "Let me see." + CALLS, tools=TOOLS)
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [call["name"] for call in calls] == ["weather", "time"]
    assert json.loads(calls[0]["arguments"]) == {"city": 'Oslo "x"', "days": 3}
    assert json.loads(calls[1]["arguments"]) == {}
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    seen = joined(chunks)
    assert seen["tool_calls"] == calls and seen["finish_reason"] == "tool_calls"
    assert "DSML" not in json.dumps([whole, chunks], ensure_ascii=False)


def test_calls_alone_have_null_content(runtime: Runtime) -> None:
    whole, _ = ask(runtime, CALLS.lstrip("\n"), tools=TOOLS)
    assert whole["choices"][0]["message"]["content"] is None


def test_broken_markup_is_said_and_never_shown(runtime: Runtime) -> None:
    whole, chunks = ask(runtime, "Well.\n\n<｜DSML｜tool_calls>\nwhat now", tools=TOOLS)
    assert whole["choices"][0]["finish_reason"] == "malformed_tool_call" == joined(chunks)["finish_reason"]
    assert "DSML" not in json.dumps([whole, chunks], ensure_ascii=False)


def test_a_stop_string_ends_the_content_in_the_middle_of_a_token(runtime: Runtime) -> None:
    whole, chunks = ask(runtime, "return self.value and more", stop=["elf.va"])
    assert whole["choices"][0]["message"]["content"] == "return s" == joined(chunks)["content"]
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_a_request_closed_while_someone_waits_for_it_is_counted_once(runtime: Runtime) -> None:
    _, plan = Models().runner(FLASH_LIKE, Shape())
    fields = {**FLASH_LIKE, "vocab_size": runtime.model_config.vocab_size}
    runner = CountingRunner()
    runner.gate.clear()  # the first request keeps the only place; the second waits behind it
    engine = engine_of(fields, runner, plan, Shape(max_running=1))
    service = Service(dataclasses.replace(runtime, engine=engine))

    def start(name: str) -> Generation:
        prompt, reader = service.prompt_of_ids([5, 6, 7]), PlainReader(runtime.tokenizer)
        return service.start(prompt, SamplingParams(max_tokens=50), reader, request_id=name)

    async def run() -> None:
        start("first")
        closed = start("second")
        waiting = asyncio.create_task(anext(closed.pieces()))
        await asyncio.sleep(0)
        closed.close()
        closed.close()
        runner.gate.set()
        with pytest.raises(CancelledError):
            await waiting

    try:
        asyncio.run(run())
    finally:
        engine.close()
    assert 'thalweg_requests_finished_total{reason="cancelled"} 1.0' in service.metrics.exposition().decode()


def test_a_failure_in_mid_stream_is_an_error_event(runtime: Runtime) -> None:
    whole, chunks = ask(runtime, "one two three four five", fail_after=3)
    assert whole["error"]["type"] == "engine_error" and "injected failure" in whole["error"]["message"]
    assert chunks[-1]["error"]["type"] == "engine_error"
    assert len(chunks) == 4
