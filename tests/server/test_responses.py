"""OpenAI's item form: scripted answers as items and events, exactly; and what its bodies may say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest

from tests.server.test_messages import events_of
from tests.server.test_scripted_answers import CALLS, exchange
from thalweg.config.options import load_options
from thalweg.engine.runtime import Runtime, build_runtime

PATH = "/v1/responses"
TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
PATCH = "*** Begin Patch\n*** End Patch\n"
PATCH_CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    f'<｜DSML｜invoke name="apply_patch">\n<｜DSML｜parameter name="input" string="true">{PATCH}</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="mcp__git__log">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
CODEX_TOOLS = [
    {"type": "function", "name": "exec_command", "description": "Runs it", "strict": False,
     "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}},
    {"type": "custom", "name": "apply_patch", "description": "Edits files",
     "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch end_patch"}},
    {"type": "namespace", "name": "mcp__git__", "description": "Git", "tools": [
        {"type": "function", "name": "log", "description": "", "strict": False, "parameters": {"type": "object"}}]},
    {"type": "web_search", "external_web_access": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return build_runtime(load_options({"kv_cache_memory": "64MiB"}, environment={}))


def ask(runtime: Runtime, text: str, fail_after: int | None = None, **fields: Any) -> tuple[dict, list[dict]]:
    body = {"input": "go", "max_output_tokens": 500, **fields}
    whole, streamed = exchange(runtime, text, PATH, body, fail_after)
    return whole.json(), events_of(streamed)


def brief(events: list[dict]) -> list[str]:
    """Names of events, with runs of equal ones written once; numbered without a gap."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names: list[str] = []
    for event in events:
        kind = event.get("item", {}).get("type") or event.get("part", {}).get("type")
        name = event["type"].removeprefix("response.") + (f" {kind}" if kind else "")
        if not names or names[-1] != name:
            names.append(name)
    return names


def plain(value: Any) -> Any:
    """Without ids and times, which differ between two answers."""
    if isinstance(value, dict):
        left_out = ("id", "call_id", "item_id", "created_at", "completed_at", "cache", "usage")
        return {k: plain(v) for k, v in value.items() if k not in left_out}
    return [plain(v) for v in value] if isinstance(value, list) else value


def check_items(events: list[dict]) -> None:
    """Deltas join to what `done` says, and every event names the item that is open."""
    item: dict = {}
    pieces: list[str] = []
    output: list[dict] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            item, pieces = event["item"], []
            assert event["output_index"] == len(output) and item["status"] == "in_progress"
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == item["id"]
            output.append(event["item"])
        elif "output_index" in event:
            assert (event["item_id"], event["output_index"]) == (item["id"], len(output))
        if kind.endswith(".delta"):
            pieces.append(event["delta"])
        elif kind.endswith(".done") and "part" not in event and "item" not in event:
            said = [event[name] for name in ("text", "arguments", "input") if name in event]
            assert said == ["".join(pieces)]
    assert events[-1]["response"]["output"] == output


def test_reasoning_text_and_calls_in_order(runtime: Runtime) -> None:
    thinking = dataclasses.replace(runtime, default_thinking=True)
    include = ["reasoning.encrypted_content"]
    whole, events = ask(thinking, "I wonder.\n</think>Let me see." + CALLS, tools=TOOLS, include=include)
    assert brief(events) == [
        "created", "in_progress",
        "output_item.added reasoning", "content_part.added reasoning_text", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done reasoning_text", "output_item.done reasoning",
        "output_item.added message", "content_part.added output_text", "output_text.delta",
        "output_text.done", "content_part.done output_text", "output_item.done message",
        "output_item.added function_call", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done function_call",
        "output_item.added function_call", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done function_call",
        "completed",
    ]  # fmt: skip
    check_items(events)
    assert plain(events[-1]["response"]) == plain(whole)
    reasoning, message, first, second = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "I wonder.\n"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "Let me see." and message["role"] == "assistant"
    assert json.loads(first["arguments"]) == {"city": 'Oslo "x"', "days": 3} and first["call_id"] != second["call_id"]
    assert {item["status"] for item in whole["output"]} == {"completed"} == {whole["status"]}
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["usage"] is None
    usage = whole["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert "DSML" not in json.dumps([whole, events], ensure_ascii=False)


def test_custom_tools_and_namespaces_come_back_as_declared(runtime: Runtime) -> None:
    whole, events = ask(runtime, "Patching." + PATCH_CALL, tools=CODEX_TOOLS)
    check_items(events)
    _, patch, log = whole["output"]
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    assert (log["type"], log["name"], log["namespace"]) == ("function_call", "log", "mcp__git__")
    names = brief(events)
    begin = names.index("output_item.added custom_tool_call")
    assert names[begin + 1 : begin + 3] == ["custom_tool_call_input.delta", "custom_tool_call_input.done"]
    assert whole["tools"] == CODEX_TOOLS


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ("one two three four five six", {"max_output_tokens": 3}, "max_output_tokens"),
        ("Well.\n\n<｜DSML｜tool_calls>\nwhat now", {"tools": TOOLS}, "malformed_tool_call"),
    ],
)
def test_incomplete_answers(runtime: Runtime, text: str, fields: dict, reason: str) -> None:
    whole, events = ask(runtime, text, **fields)
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": reason}
    assert events[-1]["type"] == "response.incomplete" and plain(events[-1]["response"]) == plain(whole)
    assert whole["output"][-1]["status"] == "incomplete"


def test_a_failure_in_mid_stream_fails_the_response(runtime: Runtime) -> None:
    whole, events = ask(runtime, "one two three four five", fail_after=3)
    assert whole["error"]["type"] == "engine_error"
    last = events[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "injected failure" in last["response"]["error"]["message"]
    brief(events)


def message(role: str, text: str) -> dict:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


# What Codex 0.1xx sends (its tools and texts shortened).
CODEX: dict[str, Any] = {
    "instructions": "You are Codex.",
    "input": [
        message("developer", "<permissions instructions>"),
        message("user", "<environment_context>"),
        message("user", "fix it"),
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAAAABo"},
        {"type": "message", "role": "assistant", "phase": "commentary",
         "content": [{"type": "output_text", "text": "Looking."}]},
        {"type": "function_call", "name": "exec_command", "arguments": '{"cmd": "ls"}', "call_id": "call_1"},
        {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
        {"type": "custom_tool_call", "status": "completed", "call_id": "call_2", "name": "apply_patch", "input": PATCH},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "Done"}]},
        {"type": "function_call", "name": "log", "namespace": "mcp__git__", "arguments": "{}", "call_id": "call_3"},
        {"type": "function_call_output", "call_id": "call_3", "output": "abc"},
    ],
    "tools": CODEX_TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0197",
    "client_metadata": {"x-codex-installation-id": "i"},
    "max_output_tokens": 8,
}  # fmt: skip


def test_what_codex_sends_is_taken(http: httpx.Client) -> None:
    response = http.post(PATH, json=CODEX, headers={"originator": "codex_cli_rs", "session_id": "s"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    last = events_of(response)[-1]
    assert last["type"] in ("response.completed", "response.incomplete")
    assert last["response"]["parallel_tool_calls"] is False and last["response"]["usage"]["input_tokens"] > 200
    assert http.post("/responses", json={**CODEX, "stream": False}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "string"),
        ({"input": []}, "input", "at least one"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "item_reference"),
        ({"input": [{"type": []}]}, "input[0].type", "not supported"),
        ({"input": [{"type": "function_cal"}]}, "input[0].type", "Did you mean 'function_call'"),
        ({"input": [{"role": "usr", "content": "x"}]}, "input[0].role", "'user'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_text"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0]", "answers no call"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "'mcp' is not supported"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools[0].parameters", "JSON Schema"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].name", "two tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "wether"}}, "tool_choice.name", "'weather'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "allowed_tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "custom", "name": "", "namespace": {}}},
            "tool_choice.namespace",
            "string",
        ),
        ({"tools": [{"type": "custom", "name": "a", "description": ["b"]}]}, "tools[0].description", "string"),
        ({"tools": [{"type": "custom", "name": "a", "format": False}]}, "tools[0].format", "object"),
        ({"input": [{"type": "reasoning", "content": 0}]}, "input[0].content", "string or a list"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": 5}]},
            "input[0].namespace",
            "string",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "c"}, "conversation", "not a supported field"),
        ({"background": True}, "background", "False"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"top_logprobs": 2}, "top_logprobs", "not a supported field"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", "must be"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"formt": {}}}, "text.formt", "Did you mean 'format'"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "ultra"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort", "Did you mean 'effort'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": 10**9}, "max_output_tokens", ""),
        ({"max_tokens": 5}, "max_tokens", "Did you mean 'max_output_tokens'"),
    ],
)
def test_bad_fields_are_named_in_the_clients_words(http: httpx.Client, fields: dict, param: str, words: str) -> None:
    response = http.post(PATH, json={"input": "hello", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error


def test_stream_options_of_benchmark_clients_are_accepted(http: httpx.Client) -> None:
    """The usage is in the last event anyway."""
    body = {"input": "hello", "max_output_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    assert '"usage":{"input_tokens":' in http.post(PATH, json=body).text.splitlines()[-2]


def test_formats_and_forced_tools_are_for_chat_to_take_or_refuse(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {}}
    chat_tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    cases = (
        ({"tools": TOOLS, "tool_choice": "required"}, {"tools": chat_tools, "tool_choice": "required"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        ),
    )
    for ours, theirs in cases:
        mine = http.post(PATH, json={"input": "hello", "max_output_tokens": 4, **ours})
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **theirs}
        assert mine.status_code == http.post("/v1/chat/completions", json=chat).status_code
        if mine.status_code == 400 and "text" in ours:
            assert mine.json()["error"]["param"].startswith("text.format")
