"""Chat encoding: the golden pairs of the published encoder, and DeepSeek's own request conversion as an oracle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepseek_recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.text import markers
from thalweg.text.chat import (
    ChatOptions,
    EncoderRevision,
    OutputStart,
    ReasoningEffort,
    ToolChoice,
    chat_segments,
    encode_chat,
    read_effort,
    render_chat,
)
from thalweg.text.tokenizer import Tokenizer

PREVIEW = EncoderRevision.PREVIEW
Conversation = list[dict[str, Any]]


def user(content: Any = "Hi  there,\n\n    def f(x): return 12345  # 你好") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None = " Answer.\n", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def calls(*ids: str, arguments: str = '{"city": "Oslo\\n", "days": [1, 2.50], "unit": null, "ok": true}') -> list[dict]:
    return [{"id": i, "type": "function", "function": {"name": "weather", "arguments": arguments}} for i in ids]


def result(call_id: str, content: Any = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content or f"result of {call_id}"}


SYSTEM = {"role": "system", "content": "You are terse. "}
REMINDER = {"role": "latest_reminder", "content": "2026-02-21, Oslo"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <｜User｜> </think> ｜DSML｜",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "天气"}}},
        },
    },
    {"type": "function", "function": {"parameters": {"type": "object"}, "name": "now", "description": ""}},
]
THOUGHT = "The user wants\nto know."
CONVERSATIONS: dict[str, Conversation] = {
    "question": [user()],
    "system": [SYSTEM, user()],
    "parts": [user([{"type": "text", "text": "one "}, {"type": "text", "text": " two"}])],
    "two turns": [SYSTEM, user(), assistant(reasoning_content=THOUGHT), user("And?")],
    "two turns, reasoning not sent": [user(), assistant(), user("And?")],
    "three turns": [user(), assistant(reasoning_content=THOUGHT), user(), assistant(reasoning_content=""), user("x")],
    "assistant last": [user(), assistant(reasoning_content=THOUGHT)],
    "two assistants": [user(), assistant(reasoning_content=THOUGHT), assistant(reasoning_content=THOUGHT), user()],
    "two users": [user("one"), user("two")],
    "system in the middle": [
        SYSTEM,
        user("one"),
        assistant(),
        {"role": "system", "content": "Now be long."},
        user("two"),
    ],
    "reminder": [SYSTEM, REMINDER, user(), assistant(), REMINDER, user("x")],
    "reminder last": [user(), assistant(), user("x"), REMINDER],
    "results": [SYSTEM, user(), assistant(None, tool_calls=calls("a", "b")), result("b"), result("a")],
    "results and user": [user(), assistant("I look", tool_calls=calls("a", "b")), result("b"), result("a"), user("x")],
    "agent": [
        SYSTEM,
        user(),
        assistant("", reasoning_content=THOUGHT, tool_calls=calls("a")),
        result("a", [{"type": "text", "text": "r1"}, {"type": "text", "text": "r2"}]),
        assistant(None, reasoning_content=THOUGHT, tool_calls=calls("b", "c")),
        result("c"),
        result("b"),
        assistant("done", reasoning_content=THOUGHT),
        user("thanks"),
    ],
    "arguments that are no object": [
        user(),
        assistant(None, tool_calls=calls("a", arguments="[1]")),
        result("a"),
        assistant(None, tool_calls=calls("b", arguments='{"a": "x')),
        result("b"),
        assistant(None, tool_calls=calls("c", arguments="{}")),
        result("c"),
    ],
}


class Oracle:
    """DeepSeek's own conversion of Chat Completions requests."""

    def __init__(self, tokenizer_path: Path) -> None:
        tokenizer = deepseek_recipe.Tokenizer.from_file(str(tokenizer_path))
        self._encoding = deepseek_recipe.DeepseekV4Encoding().with_tokenizer(tokenizer)

    def encode(self, messages: Conversation, thinking: bool, **fields: Any) -> tuple[str, list[int]]:
        kind = {"type": "enabled" if thinking else "disabled"}
        body = {"model": "DeepSeek-V4-Pro", "messages": messages, "thinking": kind, "reasoning_effort": "low", **fields}
        options = deepseek_recipe.ConversionOptions()
        conversation = deepseek_recipe.ChatCompletionRequest(body).convert(options).conversation
        return self._encoding.render_conversation(conversation).prompt, self._encoding.encode(conversation)


@pytest.fixture(scope="module")
def oracle(official_path: Path) -> Oracle:
    return Oracle(official_path)


def agree(oracle: Oracle, tokenizer: Tokenizer, messages: Conversation, options: ChatOptions, **fields: Any) -> None:
    text, ids = oracle.encode(messages, options.thinking, **fields)
    assert render_chat(messages, options) == text
    assert list(encode_chat(messages, tokenizer, options).token_ids) == ids


def golden_case(golden: Path, number: int) -> tuple[Any, str]:
    text = (golden / f"output_{number}.txt").read_text(encoding="utf-8")
    return json.loads((golden / f"input_{number}.json").read_text(encoding="utf-8")), text


def test_golden_pairs_byte_for_byte(golden: Path, official: Tokenizer, official_path: Path) -> None:
    recipe = deepseek_recipe.Tokenizer.from_file(str(official_path))
    case, text = golden_case(golden, 1)
    on_request = ChatOptions(revision=PREVIEW, tools=case["tools"])
    assert render_chat(case["messages"], on_request) == text
    first = {**case["messages"][0], "tools": case["tools"]}
    on_message = [first, *case["messages"][1:]]
    assert render_chat(on_message, ChatOptions(revision=PREVIEW)) == text
    # No text in the golden pairs spells a control string that is not meant, so the recipe may tokenise them whole.
    assert list(encode_chat(case["messages"], official, on_request).token_ids) == recipe.encode(text)
    messages, text = golden_case(golden, 3)
    assert render_chat(messages, ChatOptions(revision=PREVIEW)) == text
    assert list(encode_chat(messages, official, ChatOptions(revision=PREVIEW)).token_ids) == recipe.encode(text)


def test_fixed_texts_are_the_published_ones(golden: Path) -> None:
    cases = json.loads((golden / "cases.json").read_text(encoding="utf-8"))
    assert cases["reasoning_effort_prefix"]["max"] == markers.EFFORT_ABSOLUTE
    assert cases["response_format_template"] == markers.RESPONSE_SCHEMA + "{schema}"


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_the_oracle(
    name: str, tools: Any, thinking: bool, oracle: Oracle, official: Tokenizer
) -> None:
    fields = {"tools": tools} if tools else {}
    agree(oracle, official, CONVERSATIONS[name], ChatOptions(thinking=thinking, tools=tools), **fields)


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max"])
def test_efforts_equal_the_oracle(effort: str, thinking: bool, oracle: Oracle, official: Tokenizer) -> None:
    options = ChatOptions(thinking=thinking, reasoning_effort=read_effort(effort))
    agree(oracle, official, [SYSTEM, user()], options, reasoning_effort=effort)


def test_preview_efforts(golden: Path) -> None:
    texts = json.loads((golden / "cases.json").read_text(encoding="utf-8"))["reasoning_effort_prefix"]
    for effort, text in ((ReasoningEffort.MAX, texts["max"]), (ReasoningEffort.HIGH, ""), (ReasoningEffort.LOW, "")):
        prompt = render_chat([user("q")], ChatOptions(revision=PREVIEW, reasoning_effort=effort))
        assert prompt == f"<｜begin▁of▁sentence｜>{text}<｜User｜>q<｜Assistant｜><think>"


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "title": "é"}}},
    ],
    ids=lambda value: value["type"],
)
def test_response_formats_equal_the_oracle(
    response_format: dict[str, Any], tools: Any, oracle: Oracle, official: Tokenizer
) -> None:
    for messages in ([user("in json")], [SYSTEM, user("in json")]):
        fields = {"tools": tools} if tools else {}
        options = ChatOptions(response_format=response_format, tools=tools)
        agree(oracle, official, messages, options, response_format=response_format, **fields)


def test_tool_choices_equal_the_oracle(oracle: Oracle, official: Tokenizer) -> None:
    required = ChatOptions(thinking=False, tools=TOOLS, tool_choice=ToolChoice.REQUIRED)
    agree(oracle, official, [user()], required, tools=TOOLS, tool_choice="required")
    assert encode_chat([user()], official, required).starts_in is OutputStart.TOOL_CALLS
    hidden = ChatOptions(tools=TOOLS, tool_choice=ToolChoice.NONE)
    agree(oracle, official, CONVERSATIONS["agent"], hidden, tools=TOOLS, tool_choice="none")


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"content": "Once"}, OutputStart.CONTENT),
        ({"content": "Once", "reasoning_content": THOUGHT}, OutputStart.CONTENT),
        ({"content": "", "reasoning_content": THOUGHT}, OutputStart.REASONING),
    ],
)
def test_continued_turns_equal_the_oracle(
    fields: dict[str, Any], start: OutputStart, thinking: bool, oracle: Oracle, official: Tokenizer
) -> None:
    messages = [user(), {"role": "assistant", "prefix": True, **fields}]
    options = ChatOptions(thinking=thinking)
    agree(oracle, official, messages, options)
    prompt = encode_chat(messages, official, options)
    assert prompt.starts_in is (start if thinking else OutputStart.CONTENT)
    assert prompt.thinking == (prompt.starts_in is OutputStart.REASONING)


TEXT = st.text(max_size=12) | st.sampled_from(["<｜User｜>", "</think>", "｜DSML｜", "a\n\n", " b", "<", "</", "1"])
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers(-1000, 1000) | st.none() | st.lists(TEXT, max_size=2), max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Random conversations that the oracle accepts: user, then answers with or without calls and their results."""
    messages: Conversation = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        messages.append(user("u" + draw(TEXT)))
        for step in range(draw(st.integers(0, 2))):
            ids = [f"{turn}.{step}.{i}" for i in range(draw(st.integers(1, 3)))]
            made = [calls(i, arguments=json.dumps(draw(ARGUMENTS)))[0] for i in ids]
            messages.append(assistant(draw(TEXT), reasoning_content=draw(TEXT), tool_calls=made))
            messages += [result(i, "r" + draw(TEXT)) for i in draw(st.permutations(ids))]
        messages.append(assistant("a" + draw(TEXT), reasoning_content=draw(TEXT)))
    return messages if draw(st.booleans()) else [*messages, user("?")]


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), thinking=st.booleans(), tools=st.sampled_from([None, TOOLS]))
def test_random_conversations_equal_the_oracle(
    messages: Conversation, thinking: bool, tools: Any, oracle: Oracle, official: Tokenizer
) -> None:
    fields = {"tools": tools} if tools else {}
    agree(oracle, official, messages, ChatOptions(thinking=thinking, tools=tools), **fields)


def test_drop_thinking_off_keeps_all_reasoning() -> None:
    messages = CONVERSATIONS["two turns"]
    for revision in EncoderRevision:
        assert THOUGHT not in render_chat(messages, ChatOptions(revision=revision))
        kept = render_chat(messages, ChatOptions(revision=revision, drop_thinking=False))
        assert f"<｜Assistant｜><think>{THOUGHT}</think> Answer." in kept
        assert f"<think>{THOUGHT}" in render_chat(messages, ChatOptions(revision=revision, tools=TOOLS))
        assert THOUGHT not in render_chat(messages, ChatOptions(revision=revision, thinking=False, drop_thinking=False))


def test_developer_turns_are_user_turns_and_old_ones_vanish() -> None:
    developer = {"role": "developer", "content": "Rules."}
    for revision in EncoderRevision:
        assert "<｜User｜>Rules.<｜Assistant｜><think>" in render_chat(
            [SYSTEM, developer], ChatOptions(revision=revision)
        )
        old = [developer, assistant("x"), user("y")]
        assert "Rules." not in render_chat(old, ChatOptions(revision=revision))
        assert "Rules." in render_chat(old, ChatOptions(revision=revision, thinking=False))
        with_tools = [{**developer, "tools": TOOLS, "response_format": {"type": "object"}}]
        text = render_chat(with_tools, ChatOptions(revision=revision))
        assert text.index("<｜User｜>Rules.\n\n## Tools") < text.index('reply:\n{"type": "object"}<｜Assistant｜>')


def test_preview_places_where_the_published_encoder_has_its_own_rules() -> None:
    def render(*messages: dict[str, Any]) -> str:
        return render_chat(messages, ChatOptions(revision=PREVIEW)).removeprefix(markers.BOS)

    reasoned = assistant("A", reasoning_content="R")
    assert render(user("q"), reasoned) == "<｜User｜>q<｜Assistant｜><think>R</think>A<｜end▁of▁sentence｜>"
    assert render(user("q"), REMINDER) == "<｜User｜>q<｜Assistant｜><think><｜latest_reminder｜>2026-02-21, Oslo"
    assert render(user("q"), assistant("A"), SYSTEM, user("r")).endswith(
        "</think>A<｜end▁of▁sentence｜>You are terse. <｜User｜>r<｜Assistant｜><think>"
    )
    open_turn = assistant("A", wo_eos=True)
    assert render(user("q"), open_turn) == "<｜User｜>q<｜Assistant｜><think></think>A"
    assert render(user("q"), reasoned, assistant("B")).endswith(
        "</think>A<｜end▁of▁sentence｜></think>B<｜end▁of▁sentence｜>"
    )
    unordered = {"type": "function", "function": {"strict": True, "name": "f"}}
    assert '{"strict": true, "name": "f"}' in render({**SYSTEM, "tools": [unordered]}, user("q"))


@pytest.mark.parametrize("revision", EncoderRevision)
def test_tasks(revision: EncoderRevision) -> None:
    options = ChatOptions(revision=revision)

    def render(*messages: dict[str, Any]) -> str:
        return render_chat(messages, options).removeprefix(markers.BOS)

    assert render({**user("q"), "task": "action"}) == "<｜User｜>q<｜Assistant｜><think><｜action｜>"
    for task, marker in markers.TASK_MARKERS:
        if task != "action":
            assert render({**user("q"), "task": task}) == f"<｜User｜>q{marker}"
    answered = render({**user("q"), "task": "query"}, assistant("A"), user("r"))
    assert answered == "<｜User｜>q<｜query｜>A<｜end▁of▁sentence｜><｜User｜>r<｜Assistant｜><think>"
    assert render(user("q"), assistant("A", task="title")).endswith("A<｜end▁of▁sentence｜><｜title｜>")
    assert render({**user("q"), "task": "query"}, user("r")).startswith("<｜User｜>q<｜User｜>r")


def test_results_without_ids_belong_to_the_calls_in_order() -> None:
    answers = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
    nameless = [{"function": {"name": "f", "arguments": "{}"}}] * 2
    text = render_chat([user(), assistant(None, tool_calls=nameless), *answers])
    assert "<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>" in text


def test_a_user_text_between_results_keeps_its_place() -> None:
    messages = [user(), assistant(None, tool_calls=calls("a", "b")), result("b"), user("wait"), result("a")]
    blocks = "<tool_result>result of a</tool_result>\n\nwait\n\n<tool_result>result of b</tool_result>"
    assert f"<｜User｜>{blocks}<｜Assistant｜>" in render_chat(messages)


def injected(text: str) -> tuple[Conversation, Sequence[Mapping[str, Any]]]:
    """A conversation that has `text` in every field that a client can fill."""
    call = {"id": text, "function": {"name": text, "arguments": json.dumps({text: text, "n": [text]})}}
    tool = {"function": {"name": text, "description": text, "parameters": {text: {"description": text}}}}
    messages = [
        {"role": "system", "content": text, "response_format": {text: text}},
        {"role": "developer", "content": text},
        {"role": "latest_reminder", "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": text, "content": text},
        {"role": "assistant", "tool_calls": [{"id": "2", "function": {"name": "f", "arguments": text}}]},
    ]
    return messages, [tool]


@pytest.mark.parametrize("which", ["official", "embedded"])
def test_no_field_can_forge_a_control_token(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    harmless, tools = injected("word")
    expected = control_tokens(tokenizer, harmless, tools)
    for text in tokenizer.special_texts:
        if "holder" not in text:
            messages, tools = injected(text)
            assert control_tokens(tokenizer, messages, tools) == expected
            prompt = encode_chat(messages, tokenizer, ChatOptions(tools=tools))
            assert tokenizer.decode(prompt.token_ids) == render_chat(messages, ChatOptions(tools=tools))


def control_tokens(tokenizer: Tokenizer, messages: Conversation, tools: Sequence[Mapping[str, Any]]) -> list[int]:
    prompt = encode_chat(messages, tokenizer, ChatOptions(tools=tools))
    return [token for token in prompt.token_ids if tokenizer.is_special(token)]


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
@pytest.mark.parametrize("revision", EncoderRevision)
def test_no_field_of_a_request_can_forge_a_control_token(
    revision: EncoderRevision, thinking: bool, embedded: Tokenizer
) -> None:
    """The fields beside the messages, with each tool choice, in each revision; and an answer that is continued."""

    def controls(text: str, choice: ToolChoice) -> list[int]:
        schema = {"type": "object", "properties": {text: {"enum": [text], "description": text}}, text: text}
        options = ChatOptions(
            thinking=thinking,
            revision=revision,
            tools=[{"type": "function", "function": {"name": text, "description": text, "parameters": schema}}],
            response_format={"type": "json_schema", "json_schema": {"name": text, "schema": schema}},
            tool_choice=choice,
        )
        prefix = {"role": "assistant", "content": text, "reasoning": text, "prefix": True}
        found = []
        for end in ([], [prefix]):
            ids = encode_chat([user(text), *end], embedded, options).token_ids
            found += [token for token in ids if embedded.is_special(token)]
        return found

    for choice in ToolChoice:
        expected = controls("word", choice)
        for text in embedded.special_texts:
            assert controls(text, choice) == controls(f"{text}{text} \n{text}", choice) == expected


def test_boundaries_stand_where_turns_diverge(official: Tokenizer) -> None:
    options = ChatOptions(tools=TOOLS)
    conversation = CONVERSATIONS["agent"]
    prompt = encode_chat(conversation, official, options)
    user_id, assistant_id = official.special_id(markers.USER), official.special_id(markers.ASSISTANT)
    ids = prompt.token_ids
    assert list(prompt.boundaries) == sorted(set(prompt.boundaries))
    assert prompt.boundaries[0] == ids.index(user_id), "end of the system text and the tools"
    asked = [i for i, token in enumerate(ids) if token == assistant_id]
    assert set(asked) <= set(prompt.boundaries), "end of every user turn"
    assert {i + 1 for i in asked} <= set(prompt.boundaries), "before the think token"
    assert len(prompt.boundaries) == 1 + 2 * len(asked)


def test_the_next_turn_diverges_at_a_boundary(official: Tokenizer) -> None:
    """With reasoning dropped, the next prompt leaves the sequence before the think token of the last answer."""
    question = [SYSTEM, user("What is the weather?")]
    first = encode_chat(question, official)
    follow_up = [*question, assistant("Rain.", reasoning_content=THOUGHT), user("And tomorrow?")]
    second = encode_chat(follow_up, official)
    common = next(i for i, (a, b) in enumerate(zip(first.token_ids, second.token_ids, strict=False)) if a != b)
    assert common == first.boundaries[-1] == len(first.token_ids) - 1
    kept = [encode_chat(messages, official, ChatOptions(tools=TOOLS)).token_ids for messages in (question, follow_up)]
    assert kept[1][: len(kept[0])] == kept[0]


def test_a_boundary_inside_plain_text_counts_from_its_start(official: Tokenizer) -> None:
    """The preview revision writes a later system text right behind a user turn: no token need begin there."""
    prompt = encode_chat([user("one"), SYSTEM, user("two")], official, ChatOptions(revision=PREVIEW))
    assert official.decode(prompt.token_ids[: prompt.boundaries[0]]) == "<｜begin▁of▁sentence｜><｜User｜>"


def test_segments_are_maximal_and_control_strings_single_tokens(official: Tokenizer) -> None:
    segments = chat_segments(CONVERSATIONS["agent"], ChatOptions(tools=TOOLS))
    for left, right in itertools.pairwise(segments):
        assert left.control or right.control
    assert all(segment.text for segment in segments)
    assert all(official.special_id(segment.text) >= 0 for segment in segments if segment.control)
