"""Anthropic's form: scripted answers as blocks and events, exactly; and what its bodies may say."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.test_scripted_answers import CALLS, exchange
from thalweg.config.options import load_options
from thalweg.engine.runtime import Runtime, build_runtime

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"name": "weather", "input_schema": {"type": "object"}}]
BASE: dict[str, Any] = {"max_tokens": 500, "messages": HELLO}
ON = {"thinking": {"type": "enabled", "budget_tokens": 2000}}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return build_runtime(load_options({"kv_cache_memory": "64MiB"}, environment={}))


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each line pair must agree on the event's name."""
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def ask(runtime: Runtime, text: str, fail_after: int | None = None, **fields: Any) -> tuple[dict, list[dict]]:
    whole, streamed = exchange(runtime, text, PATH, {**BASE, **fields}, fail_after)
    assert whole.headers["request-id"].startswith("req-")
    return whole.json(), events_of(streamed)


def brief(events: list[dict]) -> list[str]:
    """Names of events, with runs of equal ones written once."""
    names: list[str] = []
    for event in events:
        kind = event.get("content_block", {}).get("type") or event.get("delta", {}).get("type")
        name = event["type"].removeprefix("content_") + (f" {kind}" if kind else "")
        if not names or names[-1] != name:
            names.append(name)
    return names


def joined(events: list[dict]) -> list[dict]:
    """The blocks that a client makes of the events; indexes must count up, one block open at a time."""
    blocks: list[dict] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append({**event["content_block"]})
            is_open, pieces = True, []
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                blocks[-1]["signature"] = delta["signature"]
                continue
            pieces.append(delta.get("text") or delta.get("thinking") or delta.get("partial_json"))
            key = {"text_delta": "text", "thinking_delta": "thinking"}.get(delta["type"], "input")
            blocks[-1][key] = json.loads("".join(pieces)) if key == "input" and closes(pieces) else "".join(pieces)
        elif event["type"] == "content_block_stop":
            is_open = False
    assert not is_open
    return [{**b, "input": b["input"] or {}} if b["type"] == "tool_use" else b for b in blocks]


def closes(pieces: list[str]) -> bool:
    try:
        return isinstance(json.loads("".join(pieces)), dict)
    except ValueError:
        return False


def without_ids(blocks: list[dict]) -> list[dict]:
    return [{k: v for k, v in block.items() if k != "id"} for block in blocks]


def test_thinking_text_and_calls_in_order(runtime: Runtime) -> None:
    whole, events = ask(runtime, "I wonder.\n</think>Let me see." + CALLS, tools=TOOLS, **ON)
    assert brief(events) == [
        "message_start", "ping",
        "block_start thinking", "block_delta thinking_delta", "block_delta signature_delta", "block_stop",
        "block_start text", "block_delta text_delta", "block_stop",
        "block_start tool_use", "block_delta input_json_delta", "block_stop",
        "block_start tool_use", "block_delta input_json_delta", "block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    thinking, text, first, second = whole["content"]
    assert thinking["thinking"] == "I wonder.\n" and thinking["signature"]
    assert text == {"type": "text", "text": "Let me see."}
    assert (first["name"], first["input"]) == ("weather", {"city": 'Oslo "x"', "days": 3})
    assert (second["name"], second["input"]) == ("time", {}) and first["id"] != second["id"]
    assert whole["stop_reason"] == "tool_use" and whole["stop_sequence"] is None
    assert without_ids(joined(events)) == without_ids(whole["content"])
    end = next(event for event in events if event["type"] == "message_delta")
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert 0 < whole["usage"]["output_tokens_details"]["thinking_tokens"] < whole["usage"]["output_tokens"]
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert start["usage"]["input_tokens"] > 0
    assert "DSML" not in json.dumps([whole, events], ensure_ascii=False)


def test_omitted_thinking_comes_back_in_its_signature(runtime: Runtime, http: httpx.Client) -> None:
    display = {"thinking": {"type": "adaptive", "display": "omitted"}}
    whole, events = ask(runtime, "I wonder.</think>42", tools=TOOLS, **display)
    block = whole["content"][0]
    assert block["thinking"] == "" and "thinking_delta" not in json.dumps(events)
    assert joined(events)[0] == block
    shown = {"type": "thinking", "thinking": "I wonder.", "signature": "of another server"}
    counts = []
    for kept in (block, shown, {"type": "redacted_thinking", "data": "x"}):
        turn = {"role": "assistant", "content": [kept, {"type": "text", "text": "42"}]}
        body = {"messages": [*HELLO, turn, *HELLO], "tools": TOOLS, **ON}
        counts.append(http.post(f"{PATH}/count_tokens", json=body).json()["input_tokens"])
    assert counts[0] == counts[1] > counts[2]


@pytest.mark.parametrize(
    ("text", "fields", "reason", "sequence"),
    [
        ("fine", {}, "end_turn", None),
        ("one two three", {"stop_sequences": ["tw"]}, "stop_sequence", "tw"),
        ("one two three four five six", {"max_tokens": 3}, "max_tokens", None),
        ("Well.\n\n<｜DSML｜tool_calls>\nwhat now", {"tools": TOOLS}, "malformed_tool_call", None),
    ],
)
def test_stop_reasons(runtime: Runtime, text: str, fields: dict, reason: str, sequence: str | None) -> None:
    whole, events = ask(runtime, text, **fields)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert joined(events) == whole["content"]


def test_a_call_that_is_cut_short_is_still_an_object(runtime: Runtime) -> None:
    whole, events = ask(runtime, "Let me see." + CALLS, tools=TOOLS, max_tokens=30)
    assert whole["stop_reason"] == "max_tokens" and whole["content"][-1]["type"] == "tool_use"
    assert without_ids(joined(events)) == without_ids(whole["content"])


def test_a_failure_in_mid_stream_is_an_error_event(runtime: Runtime) -> None:
    whole, streamed = exchange(runtime, "one two three four five", PATH, BASE, fail_after=3)
    assert whole.status_code == 500 and whole.json()["type"] == "error"
    assert whole.json()["error"]["type"] == "api_error" and "injected failure" in whole.json()["error"]["message"]
    events = events_of(streamed)
    assert events[0]["type"] == "message_start" and events[-1]["error"]["type"] == "api_error"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens must be"),
        ({"messages": []}, "messages must hold at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]}, "Did you mean 'text'"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages[0].nam is not"),
        (
            {"messages": [*HELLO, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "messages[1].content[0] answers no call",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f",
          "input": {}}]}]}, "without results"),
        (
            {"messages": [*HELLO, {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": False}]}]},
            "messages[1].content[0].content must be",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type 'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        (
            {"tools": [{"name": "f", "strict": True, "input_schema": {"properties": {"a": {"not": {}}}}}]},
            "tools[0].input_schema.properties.a.not is a keyword that cannot be enforced here, which strict asks for",
        ),
        ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name must be a string"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"stop_sequences": [""]}, "stop_sequences has an empty string"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences has 17 entries"),
        ({"stop_sequence": ["x"]}, "Did you mean 'stop_sequences'"),
        ({"output_config": {"efort": "high"}}, "Did you mean 'effort'"),
        ({"thinking": {"type": "enabled", "budget": 3}}, "Did you mean 'budget_tokens'"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"container": "x"}, "container is not a supported field"),
        ({"mcp_servers": [{}]}, "mcp_servers is not a supported field"),
        ({"temperature": 3}, "temperature must be at most 2"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
    ],
)  # fmt: skip
def test_bad_fields_are_named_in_the_clients_words(http: httpx.Client, fields: dict, words: str) -> None:
    response = http.post(PATH, content=json.dumps({**BASE, **fields}), headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"], body


def test_every_error_of_these_paths_has_anthropics_form(http: httpx.Client) -> None:
    cases = (
        (http.post(PATH, json={**BASE, "model": "other"}), 404, "not_found_error"),
        (http.get(PATH), 405, "invalid_request_error"),
        (http.post("/anthropic/v1/nothing", json={}), 404, "not_found_error"),
        (http.post(PATH, content=b"{}", headers={"content-type": "text/plain"}), 415, "invalid_request_error"),
        (http.post(PATH, content=b"no", headers={"content-type": "application/json"}), 400, "invalid_request_error"),
        (http.post(PATH, content=b" " * (64 * 2**20 + 5), headers={"content-type": "application/json"}), 413,
         "request_too_large"),
    )  # fmt: skip
    for response, status, kind in cases:
        assert response.status_code == status
        assert response.json()["type"] == "error" and response.json()["error"]["type"] == kind


# What Claude Code 2.1 sends (its tools and texts shortened).
CLAUDE_CODE: dict[str, Any] = {
    "max_tokens": 8,
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>\nToday is …\n</system-reminder>"},
            {"type": "text", "text": "list the files", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I should call Bash.", "signature": "EqQBCkYI"},
            {"type": "text", "text": "Let me look.", "citations": None},
            {"type": "tool_use", "id": "toolu_01", "name": "Bash", "input": {"command": "ls"},
             "caller": {"type": "direct"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_01", "is_error": False,
             "content": [{"type": "text", "text": "a.py\nb.py"}], "cache_control": {"type": "ephemeral"}},
        ]},
        {"role": "system", "content": "The user opened a.py."},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.107.3d9; cc_entrypoint=cli; cch=74943;"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Long instructions.", "cache_control": {"type": "ephemeral", "scope": "global"}},
    ],
    "tools": [{"name": "Bash", "description": "Runs a command", "eager_input_streaming": True,
               "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}},
               "cache_control": {"type": "ephemeral"}}],
    "metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"s"}'},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}  # fmt: skip


def test_what_claude_code_sends_is_taken(http: httpx.Client) -> None:
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,effort-2025-11-24",
        "x-app": "cli",
    }
    response = http.post(f"{PATH}?beta=true", json=CLAUDE_CODE, headers=headers)
    assert response.status_code == 200, response.text
    assert events_of(response)[-1]["type"] == "message_stop"
    left_out = ("max_tokens", "metadata", "stream")
    counting = {k: v for k, v in CLAUDE_CODE.items() if k not in left_out}
    counted = http.post(f"{PATH}/count_tokens?beta=true", json=counting, headers=headers).json()["input_tokens"]
    usage = events_of(response)[0]["message"]["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted


def test_the_billing_line_is_no_part_of_the_prompt(http: httpx.Client) -> None:
    def counted(system: Any) -> int:
        return http.post(f"{PATH}/count_tokens", json={"messages": HELLO, "system": system}).json()["input_tokens"]

    line = "x-anthropic-billing-header: cc_version=2.1; cch=74943;"
    assert counted(f"{line}\nBe brief.") == counted("Be brief.") == counted([
        {"type": "text", "text": line}, {"type": "text", "text": "Be brief."}])  # fmt: skip
    assert counted(line) == counted(None)


def test_old_thinking_is_kept_or_cleared_as_asked(http: httpx.Client) -> None:
    turn = [{"type": "thinking", "thinking": "a long thought " * 20, "signature": ""}, {"type": "text", "text": "x"}]
    messages = [*HELLO, {"role": "assistant", "content": turn}, *HELLO, {"role": "assistant", "content": turn}, *HELLO]

    def counted(keep: Any) -> int:
        management = {"edits": [{"type": "clear_thinking_20251015", "keep": keep}]}
        body = {"messages": messages, **ON, "context_management": management}
        return http.post(f"{PATH}/count_tokens", json=body).json()["input_tokens"]

    both, one = counted("all"), counted({"type": "thinking_turns", "value": 1})
    assert counted({"type": "all"}) == both > one == counted(None)
    plain = http.post(f"{PATH}/count_tokens", json={"messages": messages, **ON}).json()["input_tokens"]
    assert plain < one  # without tools the encoding leaves old thinking out


def test_forced_tools_are_for_chat_to_take_or_refuse(http: httpx.Client) -> None:
    for choice, chat in (
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ):
        body = {**BASE, "max_tokens": 4, "tools": TOOLS, "tool_choice": choice}
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        same = {"messages": HELLO, "max_tokens": 4, "tools": tools, "tool_choice": chat}
        ours, theirs = http.post(PATH, json=body), http.post("/v1/chat/completions", json=same)
        assert ours.status_code == theirs.status_code
        if ours.status_code == 400:
            assert ours.json()["error"]["message"] == theirs.json()["error"]["message"]
    hidden = http.post(PATH, json={**BASE, "max_tokens": 1, "tools": TOOLS, "tool_choice": {"type": "none"}}).json()
    plain = http.post(PATH, json={**BASE, "max_tokens": 1}).json()
    total = [u["input_tokens"] + u["cache_read_input_tokens"] for u in (hidden["usage"], plain["usage"])]
    assert total[0] == total[1]


def test_claude_names_under_deepseeks_path(http: httpx.Client) -> None:
    body = {**BASE, "max_tokens": 2, "model": "claude-sonnet-4-5"}
    assert http.post(PATH, json=body).status_code == 404
    answer = http.post(f"/anthropic{PATH}", json=body)
    assert answer.status_code == 200 and answer.json()["model"] == "thalweg-tiny"
    assert http.post(f"/anthropic{PATH}/count_tokens", json={"messages": HELLO}).json()["input_tokens"] > 0
    assert http.post(f"/anthropic{PATH}", json={**body, "model": "other"}).status_code == 404
