"""Bodies of Messages and Responses give the prompts that DeepSeek's own conversion (deepseek-recipe) gives."""

from __future__ import annotations

from typing import Any

import deepseek_recipe
import pytest

from thalweg.server.chat import as_system
from thalweg.server.messages_input import MessagesBody
from thalweg.server.messages_input import to_chat as chat_of_messages
from thalweg.server.responses_input import ResponsesBody
from thalweg.server.responses_input import to_chat as chat_of_responses
from thalweg.server.schemas import ChatBody, parse_body
from thalweg.text.chat import ChatOptions, EncoderRevision, ReasoningEffort, render_chat

MODEL = "DeepSeek-V4-Pro"
HELLO = {"role": "user", "content": "hello"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}


def ours(chat: ChatBody) -> str:
    options = ChatOptions(reasoning_effort=ReasoningEffort.HIGH, revision=EncoderRevision.LATER, tools=chat.tools)
    return render_chat([as_system(message) for message in chat.messages], options)


def theirs(request: Any) -> str:
    conversation = request.convert(deepseek_recipe.ConversionOptions()).conversation
    return deepseek_recipe.DeepseekV4Encoding().render_conversation(conversation).prompt


def assistant(*blocks: dict) -> dict:
    return {"role": "assistant", "content": list(blocks)}


def thinking(text: str) -> dict:
    return {"type": "thinking", "thinking": text, "signature": "s"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def use(identity: str, **arguments: Any) -> dict:
    return {"type": "tool_use", "id": identity, "name": "f", "input": arguments}


def result(identity: str, content: Any) -> dict:
    return {"type": "tool_result", "tool_use_id": identity, "content": content}


def system(words: str) -> dict:
    return {"role": "system", "content": words}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [HELLO]},
        {"messages": [HELLO], "system": "Be brief."},
        {"messages": [HELLO], "system": [text("Be brief."), text("Be kind.")], "tools": [TOOL]},
        {"messages": [{"role": "user", "content": [text("a"), text("b")]}, HELLO]},
        {"messages": [system("first"), HELLO, assistant(text("x")), system("later"), HELLO]},
        {"messages": [HELLO, assistant(text("x")), assistant(text("y")), HELLO], "tools": [TOOL]},
        {
            "tools": [TOOL],
            "messages": [
                HELLO,
                assistant(thinking("hm"), text("one"), text("two"), use("a", x=1, y="ü"), use("b")),
                {
                    "role": "user",
                    "content": [result("b", "second"), result("a", [text("1"), text("2")]), text("go on")],
                },
            ],
        },
        {"messages": [HELLO, assistant(thinking("old"), text("x")), HELLO]},
    ],
)
def test_messages(fields: dict) -> None:
    body = {"model": MODEL, "max_tokens": 5, **fields}
    chat, _ = chat_of_messages(parse_body(MessagesBody, body))
    assert ours(chat) == theirs(deepseek_recipe.MessagesRequest(body))


def item(role: str, words: str) -> dict:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": words}]}


def said(words: str) -> dict:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": words}]}


def reasoning(words: str) -> dict:
    return {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": words}]}


def call(identity: str, **fields: Any) -> dict:
    return {"type": "function_call", "call_id": identity, "name": "f", "arguments": '{"x": 1}', **fields}


def output(identity: str, value: Any = "done") -> dict:
    return {"type": "function_call_output", "call_id": identity, "output": value}


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "hello"},
        {"input": "hello", "instructions": "Be brief.", "tools": [FUNCTION]},
        {"input": [item("system", "sys"), item("developer", "dev"), HELLO], "instructions": "ins", "tools": [FUNCTION]},
        {"input": [HELLO, said("x"), item("developer", "later"), HELLO]},
        {"input": [HELLO, said("1"), said("2"), HELLO], "tools": [FUNCTION]},
        {"input": [HELLO, reasoning("r1"), said("1"), reasoning("r2"), said("2"), HELLO], "tools": [FUNCTION]},
        {"input": [HELLO, reasoning("r1"), reasoning("r2"), said("2"), HELLO], "tools": [FUNCTION]},
        {
            "input": [HELLO, reasoning("r"), said("s"), call("a"), call("b"), output("b", "2"), output("a", "1")],
            "tools": [FUNCTION],
        },
        {"input": [HELLO, call("a"), output("a"), reasoning("more"), call("b"), output("b")], "tools": [FUNCTION]},
        {
            "input": [HELLO, call("a", namespace="mcp__gh__"), output("a", [{"type": "input_text", "text": "x"}])],
            "tools": [{"type": "namespace", "name": "mcp__gh__", "description": "d", "tools": [FUNCTION]}],
        },
        {"input": "hello", "tools": [FUNCTION, {"type": "web_search"}, {"type": "image_generation"}]},
    ],
)
def test_responses(fields: dict) -> None:
    body = {"model": MODEL, **fields}
    chat, _, _ = chat_of_responses(parse_body(ResponsesBody, body))
    assert ours(chat) == theirs(deepseek_recipe.ResponsesRequest(body))
