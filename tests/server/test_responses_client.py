"""The real `openai` client on /v1/responses, against the real server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

MODEL = "thalweg-tiny"
TOOLS: list[Any] = [
    {"type": "function", "name": "f", "description": "d", "strict": False, "parameters": {"type": "object"}}
]


def ask(client: OpenAI, given: Any = "hello", **fields: Any) -> Any:
    return client.responses.create(
        **{"model": MODEL, "input": given, "max_output_tokens": 12, "temperature": 0, **fields}
    )


def test_whole_and_streamed_agree(client: OpenAI) -> None:
    whole = ask(client, "a story", instructions="Be brief.")
    assert whole.object == "response" and whole.status in ("completed", "incomplete")
    if whole.status == "incomplete":
        assert whole.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(
        model=MODEL, input="a story", instructions="Be brief.", max_output_tokens=12, temperature=0
    ) as stream:
        events = list(stream)
    shown = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert shown == whole.output_text
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    last = events[-1].response
    assert last.output_text == whole.output_text and last.status == whole.status
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_reasoning_is_an_item_and_can_be_sent_back(client: OpenAI) -> None:
    answer = ask(client, extra_body=None, reasoning={"effort": "none"})
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    kept = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm " * 50}],
    }
    turns: list[Any] = [{"role": "user", "content": "hi"}, kept, *ask(client).output, {"role": "user", "content": "on"}]
    with_it = ask(client, turns, tools=TOOLS).usage.input_tokens
    without = ask(client, [turns[0], *turns[2:]], tools=TOOLS).usage.input_tokens
    assert with_it >= without


def test_tools_and_their_results(client: OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
    result = {"type": "function_call_output", "call_id": "c1", "output": "done"}
    answer = ask(client, [{"role": "user", "content": "go"}, call, result], tools=TOOLS)
    assert answer.usage.input_tokens > ask(client, "go").usage.input_tokens + 100
    assert answer.tools[0].name == "f" and answer.tool_choice == "auto"


def test_cached_tokens(client: OpenAI) -> None:
    text = "some words that stand here " * 100
    first, second = ask(client, text).usage, ask(client, text).usage
    assert second.input_tokens_details.cached_tokens > 0
    assert second.input_tokens == first.input_tokens == second.total_tokens - second.output_tokens


def test_nothing_is_stored(client: OpenAI) -> None:
    answer = ask(client, store=True, metadata={"a": "b"})
    assert answer.store is False and answer.metadata == {"a": "b"}
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        ask(client, previous_response_id=answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_forced_tools_and_formats(client: OpenAI) -> None:
    for choice in ("required", {"type": "function", "name": "f"}):
        answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=200)
        assert [item.type for item in answer.output] == ["function_call"] and answer.output[0].name == "f"
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    assert json.loads(ask(client, text=text, max_output_tokens=60).output_text)["a"] in ("x", "y")
