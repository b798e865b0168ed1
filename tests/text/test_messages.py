"""Bad requests: every complaint names the field by its path and says what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from thalweg.errors import RequestError
from thalweg.text.chat import ChatOptions, EncoderRevision, ToolChoice, read_effort, render_chat

USER = {"role": "user", "content": "q"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLER = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "f"}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


BAD: list[tuple[Any, str, str]] = [
    ([], "messages", "at least one message"),
    ("hello", "messages", "list of messages"),
    ([USER, "hello"], "messages[1]", "object with `role`"),
    ([{"content": "q"}], "messages[0].role", "one of system, developer, user, assistant, tool, latest_reminder"),
    ([{"role": "asistant", "content": "q"}], "messages[0].role", "Did you mean 'assistant'"),
    ([{"role": ["user"], "content": "q"}], "messages[0].role", "must be one of"),
    ([{"role": "user"}], "messages[0].content", "string or a list"),
    ([{"role": "user", "content": 7}], "messages[0].content", "string or a list"),
    ([{"role": "user", "content": b"q"}], "messages[0].content", "string or a list"),
    (
        [USER, USER, {"role": "user", "content": [{"type": "image_url"}]}],
        "messages[2].content[0].type",
        "must be 'text'",
    ),
    ([{"role": "user", "content": [{"text": "q"}]}], "messages[0].content[0].type", "must be 'text'"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be a string"),
    ([{"role": "user", "content": ["q"]}], "messages[0].content[0]", "must be an object"),
    ([{"role": "user", "content": "a\ud800"}], "messages[0].content", "surrogate pair at character 1"),
    ([{**USER, "nmae": "x"}], "messages[0].nmae", "not supported in a user message"),
    ([{**USER, "tools": [TOOL]}], "messages[0].tools", "not supported in a user message"),
    ([{**USER, "task": "sing"}], "messages[0].task", "action, query, authority, domain, title, read_url"),
    ([USER, {"role": "assistant"}], "messages[1].content", "content, reasoning_content or tool_calls"),
    ([USER, {"role": "assistant", "content": "x", "prefix": "yes"}], "messages[1].prefix", "true or false"),
    ([USER, {"role": "assistant", "content": "x", "prefix": True}, USER], "messages[1].prefix", "only the last"),
    ([USER, {"role": "assistant", "reasoning_content": 1}], "messages[1].reasoning_content", "must be a string"),
    ([USER, {"role": "assistant", "tool_calls": "f"}], "messages[1].tool_calls", "list of calls"),
    ([USER, {"role": "assistant", "tool_calls": [1]}], "messages[1].tool_calls[0]", "`function`"),
    ([USER, {"role": "assistant", "tool_calls": [{"type": "code"}]}], "messages[1].tool_calls[0].type", "'function'"),
    ([USER, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function", "with a `name`"),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
        "messages[1].tool_calls[0].function.name",
        "at least one character",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
        "messages[1].tool_calls[0].function.arguments",
        "string that holds a JSON object",
    ),
    ([USER, {"role": "tool", "content": "r"}], "messages[1].tool_call_id", "has no tool_calls"),
    ([USER, CALLER, {"role": "tool", "tool_call_id": "b", "content": ""}], "messages[2].tool_call_id", "['a']"),
    ([USER, CALLER, {"role": "tool", "tool_call_id": 1, "content": ""}], "messages[2].tool_call_id", "string"),
    ([USER, CALLER, *[{"role": "tool", "content": ""}] * 2], "messages[3].tool_call_id", "have a result already"),
    ([USER, CALLER, {"role": "tool", "tool_call_id": "a", "task": "title", "content": ""}], "messages[2].task", "tool"),
    ([{"role": "system", "content": "", "tools": {}}, USER], "messages[0].tools", "list of tools"),
    ([{"role": "system", "content": "", "tools": [tool(name="")]}], "messages[0].tools[0].function.name", "string"),
    ([{"role": "system", "content": "", "response_format": "json"}], "messages[0].response_format", "object"),
]


@pytest.mark.parametrize("revision", EncoderRevision)
@pytest.mark.parametrize(
    ("messages", "param", "complaint"), BAD, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(BAD)]
)
def test_bad_messages(messages: Any, param: str, complaint: str, revision: EncoderRevision) -> None:
    with pytest.raises(RequestError) as caught:
        render_chat(messages, ChatOptions(revision=revision))
    assert caught.value.param == param
    assert complaint in caught.value.message and param in caught.value.message


BAD_OPTIONS: list[tuple[ChatOptions, str, str]] = [
    (ChatOptions(tools=[TOOL, {}]), "tools[1].function", "with a `name`"),
    (ChatOptions(tools=[{"type": "retrieval"}]), "tools[0].type", "'function'"),
    (ChatOptions(tools=[tool(description=7)]), "tools[0].function.description", "string"),
    (ChatOptions(tools=[tool(parameters="{}")]), "tools[0].function.parameters", "JSON Schema object"),
    (ChatOptions(tools=[tool(parameters={"a": float("nan")})]), "tools[0].function.parameters", "plain JSON"),
    (ChatOptions(tools=[tool(parameters={"a": {1, 2}})]), "tools[0].function.parameters", "plain JSON"),
    (ChatOptions(tools=[tool(parameters={"a": deep()})]), "tools[0].function.parameters", "plain JSON"),
    (ChatOptions(tools=[tool(parameters={"a": "\udfff"})]), "tools[0].function.parameters", "plain JSON"),
    (ChatOptions(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "JSON Schema"),
    (ChatOptions(response_format={"type": "object", "x": {1}}), "response_format", "plain JSON"),
    (ChatOptions(tool_choice=ToolChoice.REQUIRED, thinking=False), "tool_choice", "needs tools"),
]


@pytest.mark.parametrize(("options", "param", "complaint"), BAD_OPTIONS, ids=[param for _, param, _ in BAD_OPTIONS])
def test_bad_options(options: ChatOptions, param: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        render_chat([USER], options)
    assert caught.value.param == param


def test_a_response_format_given_twice_is_refused() -> None:
    system = {"role": "system", "content": "", "response_format": {"type": "object"}}
    with pytest.raises(RequestError, match="more than once"):
        render_chat([system, USER], ChatOptions(response_format={"type": "json_object"}))


@pytest.mark.parametrize("value", ["hihg", 3, ["low"], ""])
def test_unknown_efforts(value: object) -> None:
    with pytest.raises(RequestError, match="minimal, low, medium, high, xhigh, max, ultra") as caught:
        read_effort(value)
    assert caught.value.param == "reasoning_effort"
    assert read_effort(None) == "low"


def test_a_response_message_can_be_sent_back_as_it_came() -> None:
    """Clients return whole messages; fields that say nothing are no fault of theirs."""
    answer = {
        "role": "assistant",
        "content": "A",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    assert "A<｜end▁of▁sentence｜>" in render_chat([USER, answer, USER])
    named = {"role": "tool", "tool_call_id": "a", "name": "f", "content": "r"}
    assert "<tool_result>r</tool_result>" in render_chat([USER, CALLER, named])


@pytest.mark.parametrize(
    "arguments", ["", "nojson", "[1]", '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800"}', "1" * 5000]
)
def test_arguments_that_are_no_json_object_are_passed_as_one_string(arguments: str) -> None:
    caller = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    parameter = f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>'
    assert parameter in render_chat([USER, caller])
