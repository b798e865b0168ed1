"""The real `anthropic` client against the real server."""

from __future__ import annotations

import json
import uuid
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.server.conftest import Server, start
from thalweg.prose.library import library_texts

MODEL = "thalweg-tiny"
GREEDY = {"temperature": 0}  # a field that newer versions of this package do not name
TOOLS: list[Any] = [
    {
        "name": "read_file",
        "description": "Reads a file",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    }
]


@pytest.fixture
def claude(server: Server) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def ask(claude: Anthropic, content: Any = "hello", **fields: Any) -> Any:
    fields = {"model": MODEL, "max_tokens": 6, "extra_body": GREEDY, **fields}
    return claude.messages.create(messages=[{"role": "user", "content": content}], **fields)


def test_whole_and_streamed_agree(claude: Anthropic) -> None:
    whole = ask(claude, "a story", system="Be brief.", max_tokens=12)
    assert whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(
        model=MODEL,
        max_tokens=12,
        extra_body=GREEDY,
        system="Be brief.",
        messages=[{"role": "user", "content": "a story"}],
    ) as stream:
        shown = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert shown == "".join(block.text for block in whole.content if block.type == "text")
    assert [block.type for block in last.content] == [block.type for block in whole.content]
    assert (last.stop_reason, last.model) == (whole.stop_reason, whole.model)
    total = [m.usage.input_tokens + m.usage.cache_read_input_tokens for m in (whole, last)]
    assert total[0] == total[1] and whole.usage.output_tokens == last.usage.output_tokens
    assert whole._request_id


def test_thinking(claude: Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    answer = ask(claude, thinking=thinking, max_tokens=8)
    assert answer.content[0].type == "thinking" and answer.content[0].thinking and answer.content[0].signature
    assert answer.usage.output_tokens_details.thinking_tokens > 0
    again = claude.messages.create(
        model=MODEL,
        max_tokens=4,
        thinking=thinking,
        messages=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": "go on"},
        ],
    )
    assert again.usage.output_tokens > 0
    assert ask(claude, thinking={"type": "disabled"}).content[0].type == "text"


def test_tools_results_and_counts(claude: Anthropic) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "read it"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "read_file", "input": {"path": "a"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "the file"}]},
    ]
    answer = claude.messages.create(model=MODEL, max_tokens=4, messages=messages, tools=TOOLS)
    counted = claude.messages.count_tokens(model=MODEL, messages=messages, tools=TOOLS).input_tokens
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == counted
    assert counted > claude.messages.count_tokens(model=MODEL, messages=messages[:1]).input_tokens + 100
    beta = claude.beta.messages.count_tokens(model=MODEL, messages=messages, tools=TOOLS, betas=["some-beta"])
    assert beta.input_tokens == counted


def test_a_prefilled_answer_is_continued(claude: Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one, two,"}]
    prefilled = claude.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    closed = claude.messages.count_tokens(model=MODEL, messages=[*messages, messages[0]]).input_tokens
    assert prefilled < closed
    assert claude.messages.create(model=MODEL, max_tokens=4, messages=messages).usage.output_tokens > 0


def test_models(claude: Anthropic) -> None:
    assert [model.id for model in claude.models.list()] == [MODEL]
    assert claude.models.retrieve(MODEL).display_name == MODEL


def test_errors_are_the_clients_own(claude: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens must be at least 1"):
        ask(claude, max_tokens=0)
    with pytest.raises(anthropic.NotFoundError):
        ask(claude, model="other")


def test_keys_in_either_header() -> None:
    server = start("--api-key", "sk-claude-0123456789")
    try:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            ask(Anthropic(base_url=server.url, api_key="wrong-0123456789", max_retries=0))
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
        for shown in ({"api_key": "sk-claude-0123456789"}, {"auth_token": "sk-claude-0123456789"}):
            client = Anthropic(base_url=f"{server.url}/anthropic", max_retries=0, timeout=60, **shown)
            assert ask(client).usage.output_tokens > 0
    finally:
        server.process.terminate()
        server.process.wait(10)


def test_a_session_of_thirty_turns_is_served_from_the_cache(claude: Anthropic) -> None:
    """An agent's session: each turn calls a tool and sends all before it again, with another billing line."""
    source = next(text for text in library_texts() if len(text) > 40_000)
    instructions = source[:8_000]
    messages: list[Any] = [{"role": "user", "content": f"session {uuid.uuid4()}: what do these files say?"}]
    shares = []
    for turn in range(30):
        system: list[Any] = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={turn:05x};"},
            {"type": "text", "text": instructions, "cache_control": {"type": "ephemeral"}},
        ]
        with claude.messages.stream(
            model=MODEL, max_tokens=8, extra_body=GREEDY, system=system, messages=messages, tools=TOOLS
        ) as stream:
            answer = stream.get_final_message()
        usage = answer.usage
        shares.append(usage.cache_read_input_tokens / (usage.input_tokens + usage.cache_read_input_tokens))
        texts = [block.model_dump() for block in answer.content if block.type == "text"]
        call = {"type": "tool_use", "id": f"t{turn}", "name": "read_file", "input": {"path": f"file{turn}.py"}}
        result = {"type": "tool_result", "tool_use_id": f"t{turn}", "content": source[turn * 300 : turn * 300 + 300]}
        messages += [{"role": "assistant", "content": [*texts, call]}, {"role": "user", "content": [result]}]
    assert min(shares[3:]) > 0.9, shares


def test_forced_tools_formats_and_budgets(claude: Anthropic) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "read_file", "disable_parallel_tool_use": True}):
        answer = ask(claude, tools=TOOLS, tool_choice=choice, max_tokens=200)
        assert answer.stop_reason in ("tool_use", "max_tokens")
        assert answer.content[-1].type == "tool_use" and answer.content[-1].name == "read_file"
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(claude, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=60)
    assert json.loads(answer.content[-1].text)["a"] in ("x", "y")
    thinking: Any = {"type": "enabled", "budget_tokens": 5}
    assert ask(claude, thinking=thinking, max_tokens=40).usage.output_tokens_details.thinking_tokens <= 5
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].input_schema.properties.a.type"):
        wrong = {"type": "object", "properties": {"a": {"type": "strin"}}}
        ask(claude, tools=[{"name": "f", "input_schema": wrong}], tool_choice={"type": "any"})
