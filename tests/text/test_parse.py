"""Output parsing: every cut gives the same message, no markup reaches content, no text is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import deepseek_recipe as recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.text.chat import ChatOptions, OutputStart, chat_segments, encode_chat
from thalweg.text.deltas import ParsedMessage, ToolCallArguments, ToolCallEnd, ToolCallStart, collect
from thalweg.text.markers import DSML, END_THINK, EOS, THINK
from thalweg.text.parse import ChatParser, parse_message
from thalweg.text.tokenizer import Tokenizer

CONTROL = re.compile("(｜DSML｜|<think>|</think>|<｜end▁of▁sentence｜>)")
CALL = (
    '<｜DSML｜invoke name="find">\n<｜DSML｜parameter name="query" string="true">tea & "milk"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="limits" string="false">[1, 2.5, null]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
BLOCK = f"\n\n<｜DSML｜tool_calls>\n{CALL}</｜DSML｜tool_calls>"
ARGUMENTS = {"query": 'tea & "milk"\n', "limits": [1, 2.5, None]}


def pieces_of(text: str, plain: bool = False) -> list[tuple[str, bool]]:
    """(text, special) pieces; with `plain` every control string is spelled in ordinary text."""
    return [(piece, not plain and bool(CONTROL.fullmatch(piece))) for piece in CONTROL.split(text) if piece]


def parse_pieces(
    tokenizer: Tokenizer, pieces: list[tuple[str, bool]], starts_in: OutputStart = OutputStart.CONTENT
) -> ParsedMessage:
    parser = ChatParser(tokenizer, starts_in)
    deltas = [delta for text, special in pieces for delta in parser.push_piece(text, special)]
    deltas += parser.finish()
    indices = [delta.index for delta in deltas if isinstance(delta, ToolCallStart)]
    assert indices == list(range(parser.tool_calls))
    ends = [delta.index for delta in deltas if isinstance(delta, ToolCallEnd)]
    assert ends == indices, "every call that begins also ends"
    return collect(deltas, parser.malformed, parser.unparsed)


def cut(pieces: list[tuple[str, bool]], size: int) -> list[tuple[str, bool]]:
    """The same pieces with plain text cut every `size` characters."""
    result = []
    for text, special in pieces:
        step = len(text) if special else size
        result += [(text[i : i + step], special) for i in range(0, len(text), step)]
    return result


OUTPUTS = {
    "content": "Hello, <b>world</b> | a | b |\n\n\n",
    "thinking": f"Let me see.\n\n{END_THINK}\n\nDone.{EOS}",
    "call": f"I look.{BLOCK}{EOS}",
    "thinking and call": f"I need data{END_THINK}{BLOCK}{EOS}",
    "two calls": f"x\n\n<｜DSML｜tool_calls>\n{CALL}{CALL}</｜DSML｜tool_calls>",
    "two blocks": f"x{BLOCK}\n\n\n{BLOCK}\n",
    "text behind": f"{BLOCK}\n and so on",
    "no arguments": '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    "without blank line": f"Sure.{BLOCK.lstrip()}",
    "one line": BLOCK.replace(">\n", ">"),
    "without block tags": f"ok\n\n{CALL}",
    "block not closed": f"ok\n\n<｜DSML｜tool_calls>\n{CALL}",
    "invoke not closed": f"\n\n<｜DSML｜tool_calls>\n{CALL.replace('</｜DSML｜invoke>', '')}</｜DSML｜tool_calls>",
    "parameter not closed": BLOCK.replace("2.5, null]</｜DSML｜parameter>", "2.5, null]"),
    "older block name": BLOCK.replace("tool_calls", "function_calls"),
    "missing angle": BLOCK.replace("tool_calls>", "tool_calls"),
    "body as JSON": '<｜DSML｜tool_calls><｜DSML｜invoke name="f">\n{"a": "x<y", "b": [1]}\n</｜DSML｜invoke>'
    "</｜DSML｜tool_calls>",
    "call in thinking, never closed": f"I must look.{BLOCK}",
    "call drafted in thinking": f"I could write{BLOCK}\nbut no.{END_THINK}Answer",
    "call drafted, then made": f"I write{BLOCK}{END_THINK}{BLOCK}",
    "mention in thinking": f"a <｜DSML｜tool_calls> block\n<｜DSML｜tool_calls> is markup{END_THINK}ok",
    "mention in content": "Use <｜DSML｜tool_calls> to call, or ｜DSML｜.",
    "stray closers": "a</｜DSML｜parameter>b\n</｜DSML｜invoke></｜DSML｜tool_calls> c",
    "unknown tag": "a <｜DSML｜wrong> b",
    "stray text in block": f"\n\n<｜DSML｜tool_calls>\n{CALL}oh\n{CALL}</｜DSML｜tool_calls>",
    "same parameter twice": CALL.replace("limits", "query"),
    "not JSON": CALL.replace("[1, 2.5, null]", "[1, 2.5"),
    "python constant": CALL.replace("[1, 2.5, null]", "True"),
    "string flag missing": CALL.replace(' string="false"', ""),
    "think again": f"{THINK}{THINK}\nhm{END_THINK}{END_THINK}ok {END_THINK} {THINK}",
    "bare marks": "｜DSML｜ |DSML| /|DSML| <｜DSML｜ </｜DSML｜",
    "long name": f'<｜DSML｜invoke name="{"n" * 2000}">\n',
    "mark in value": CALL.replace("tea", "<｜DSML｜tool_calls> ｜DSML｜ <｜DSML｜x></think>"),
}


@pytest.mark.parametrize("plain", [False, True], ids=["control tokens", "spelled"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_split_point_gives_the_same_message(name: str, plain: bool, embedded: Tokenizer) -> None:
    pieces = pieces_of(OUTPUTS[name], plain)
    for starts_in in OutputStart:
        whole = parse_pieces(embedded, pieces, starts_in)
        assert parse_pieces(embedded, cut(pieces, 1), starts_in) == whole
        for size in (2, 3, 5, 7, 11):
            assert parse_pieces(embedded, cut(pieces, size), starts_in) == whole
    for place, (text, special) in enumerate(pieces):
        for at in range(1, 0 if special else len(text), 1 + len(text) // 60):
            halves = [*pieces[:place], (text[:at], False), (text[at:], False), *pieces[place + 1 :]]
            assert parse_pieces(embedded, halves) == parse_pieces(embedded, pieces)


FRAGMENTS = [
    *(
        "a",
        "@",
        "@@ ",
        "\n",
        "\n\n",
        " ",
        "<",
        "</",
        ">",
        "|",
        "｜",
        "D",
        "DSML",
        "｜DSML",
        "/",
        '"',
        "{",
        "{}",
        "1",
        "é",
    ),
    *("tool_calls>", "tool_calls", "function_calls>", "invoke", "invoke>", "parameter", "parameter>", "think>", "true"),
    *(' name="f">', ' name="k" string="true">', ' name="k" string="false">', "|DSML|"),
    *("<|DSML|tool_calls>", '<|DSML|invoke name="g">', "｜DSML｜"),
]
CONTROLS = [DSML, THINK, END_THINK, EOS, "<｜User｜>"]
TAGS = [
    *("<｜DSML｜tool_calls>\n", '<｜DSML｜invoke name="f">\n', '<｜DSML｜parameter name="k" string="true">'),
    *('<｜DSML｜parameter name="j" string="false">', "</｜DSML｜parameter>\n", "</｜DSML｜invoke>\n"),
    "</｜DSML｜tool_calls>",
]
PIECE = st.one_of(
    st.sampled_from(FRAGMENTS).map(lambda text: [(text, False)]),
    st.sampled_from(CONTROLS).map(lambda text: [(text, True)]),
    st.sampled_from(TAGS).map(pieces_of),
    st.text(max_size=4).map(lambda text: [(text, False)]),
)
OUTPUT = st.lists(PIECE, max_size=25).map(lambda lists: [piece for pieces in lists for piece in pieces])


@settings(max_examples=600, deadline=None)
@given(pieces=OUTPUT, starts_in=st.sampled_from(OutputStart), size=st.integers(1, 6))
def test_random_output_in_random_cuts(
    pieces: list[tuple[str, bool]], starts_in: OutputStart, size: int, embedded: Tokenizer
) -> None:
    joined: list[tuple[str, bool]] = []
    for text, special in pieces:
        if joined and not special and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        else:
            joined.append((text, special))
    whole = parse_pieces(embedded, joined, starts_in)
    assert parse_pieces(embedded, cut(joined, size), starts_in) == whole
    assert parse_pieces(embedded, pieces, starts_in) == whole
    if not whole.unparsed:  # text on both sides of what was taken out may look like a mark by chance
        assert "｜DSML｜" not in whole.content and "<|DSML|" not in whole.content
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=400, deadline=None)
@given(pieces=OUTPUT, starts_in=st.sampled_from(OutputStart))
def test_no_letter_is_lost(pieces: list[tuple[str, bool]], starts_in: OutputStart, embedded: Tokenizer) -> None:
    """A character that no markup uses is found again as often as it was said."""
    said = [*pieces, ("@", False)]
    message = parse_pieces(embedded, said, starts_in)
    found = message.reasoning + message.content + message.unparsed
    found += "".join(call.name + call.arguments for call in message.tool_calls)
    assert found.count("@") == sum(text.count("@") for text, _ in said)


WELL_FORMED = ["content", "call", "thinking and call", "two calls", "no arguments", "mark in value"]
REPAIRED_BY_BOTH = ["without blank line", "one line", "without block tags", "block not closed", "invoke not closed"]


@pytest.mark.parametrize("name", [*WELL_FORMED, *REPAIRED_BY_BOTH, "older block name", "missing angle"])
def test_messages_equal_those_of_the_oracle(name: str, official: Tokenizer, official_path: Path) -> None:
    """DeepSeek's own stream parser, fed with the same tokens one by one."""
    tokens: list[int] = []
    for text, special in pieces_of(OUTPUTS[name].removesuffix(EOS)):
        tokens += [official.special_id(text)] if special else official.encode_text(text)
    thinking = "thinking" in name
    body = {
        "model": "DeepSeek-V4-Pro",
        "messages": [{"role": "user", "content": "?"}],
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}],
    }
    request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    processor = recipe.StreamProcessor(
        recipe.ChatCompletionRequest.chunk_generator(request, "id", "model"),
        request.parsing_options,
        recipe.Tokenizer.from_file(str(official_path)),
    )
    chunks = [chunk for token in tokens for chunk in processor.push(recipe.InferenceChunk.tokens([token]))]
    chunks += processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    response = recipe.ChatCompletionResponse("id", "model", 0, 1, 0)
    for chunk in [*chunks, *processor.finish()]:
        response.accumulate(chunk)
    expected = json.loads(response.to_json())["choices"][0]["message"]
    message = parse_message(tokens, official, OutputStart.REASONING if thinking else OutputStart.CONTENT)
    assert message.content == (expected["content"] or "")
    assert message.reasoning == (expected.get("reasoning_content") or "")
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in expected.get("tool_calls", [])
    ]
    assert not message.malformed


def message_of(name: str, embedded: Tokenizer, starts_in: OutputStart, plain: bool = False) -> ParsedMessage:
    return parse_pieces(embedded, pieces_of(OUTPUTS[name], plain), starts_in)


@pytest.mark.parametrize(
    ("name", "content", "calls"),
    [
        ("call", "I look.", 1),
        ("two calls", "x", 2),
        ("two blocks", "x", 2),
        ("without blank line", "Sure.", 1),
        ("one line", "", 1),
        ("without block tags", "ok", 1),
        ("block not closed", "ok", 1),
        ("invoke not closed", "", 1),
        ("parameter not closed", "", 1),
        ("older block name", "", 1),
        ("missing angle", "", 1),
        ("text behind", "\n and so on", 1),
    ],
)
def test_plain_meaning_is_repaired(name: str, content: str, calls: int, embedded: Tokenizer) -> None:
    message = message_of(name, embedded, OutputStart.CONTENT)
    assert message.content == content
    assert not message.malformed and not message.unparsed
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [("find", ARGUMENTS)] * calls
    assert all(call.complete for call in message.tool_calls)


@pytest.mark.parametrize("bars", ["|", "｜"])
def test_markup_spelled_in_plain_text_is_markup_in_content(bars: str, embedded: Tokenizer) -> None:
    text = OUTPUTS["call"].replace("｜DSML｜", f"{bars}DSML{bars}").replace(EOS, "")
    message = parse_pieces(embedded, [(text, False)])
    assert message.content == "I look." and not message.malformed
    assert [json.loads(call.arguments) for call in message.tool_calls] == [ARGUMENTS]


def test_thinking_ends_at_its_token_only(embedded: Tokenizer) -> None:
    pieces = [("the tag </think> and <｜DSML｜tool_calls>\n", False), (END_THINK, True), ("ok </think>", False)]
    message = parse_pieces(embedded, pieces, OutputStart.REASONING)
    assert message.reasoning == "the tag </think> and <｜DSML｜tool_calls>\n"
    assert message.content == "ok </think>"


def test_a_block_inside_thinking_is_a_call_only_if_thinking_never_closes(embedded: Tokenizer) -> None:
    never = message_of("call in thinking, never closed", embedded, OutputStart.REASONING)
    assert (never.reasoning, never.content, len(never.tool_calls)) == ("I must look.", "", 1)
    assert json.loads(never.tool_calls[0].arguments) == ARGUMENTS
    draft = message_of("call drafted in thinking", embedded, OutputStart.REASONING)
    assert (draft.reasoning, draft.content) == (f"I could write{BLOCK}\nbut no.", "Answer")
    assert not draft.tool_calls and not draft.malformed
    made = message_of("call drafted, then made", embedded, OutputStart.REASONING)
    assert (made.reasoning, made.content, len(made.tool_calls)) == (f"I write{BLOCK}", "", 1)


def test_broken_markup_is_kept_out_of_content_and_said(embedded: Tokenizer) -> None:
    mention = message_of("mention in content", embedded, OutputStart.CONTENT)
    assert mention.content == "Use  to call, or ."
    assert mention.unparsed == "<｜DSML｜tool_calls>｜DSML｜"
    assert mention.malformed
    for name in ("stray closers", "unknown tag", "stray text in block", "same parameter twice", "bare marks"):
        message = message_of(name, embedded, OutputStart.CONTENT)
        assert message.malformed and message.unparsed, name
        assert "｜DSML｜" not in message.content


@pytest.mark.parametrize(
    ("name", "limits"),
    [("not JSON", "[1, 2.5"), ("python constant", True), ("string flag missing", [1, 2.5, None])],
)
def test_values_become_json(name: str, limits: object, embedded: Tokenizer) -> None:
    message = message_of(name, embedded, OutputStart.CONTENT)
    assert json.loads(message.tool_calls[0].arguments) == {**ARGUMENTS, "limits": limits}


def test_a_json_body_is_taken_as_arguments(embedded: Tokenizer) -> None:
    message = message_of("body as JSON", embedded, OutputStart.CONTENT)
    assert json.loads(message.tool_calls[0].arguments) == {"a": "x<y", "b": [1]}
    assert not message.malformed


def test_truncation_anywhere_gives_valid_arguments_and_says_so(embedded: Tokenizer) -> None:
    pieces = cut(pieces_of(f"I look.{BLOCK}"), 1)
    for length in range(len(pieces)):
        message = parse_pieces(embedded, pieces[:length])
        assert "DSML" not in message.content
        calls = [json.loads(call.arguments) for call in message.tool_calls]
        assert all(set(call) <= set(ARGUMENTS) for call in calls)
        if calls and not message.tool_calls[0].complete:
            assert message.malformed
        if not message.malformed and calls:
            assert calls == [ARGUMENTS]


IN_THINKING = ["call in thinking, never closed", "call drafted in thinking", "call drafted, then made"]
BROKEN = ["body as JSON", "stray text in block", "same parameter twice", "mention in content", "older block name"]


@pytest.mark.parametrize("plain", [False, True], ids=["control tokens", "spelled"])
@pytest.mark.parametrize("name", [*IN_THINKING, *BROKEN])
def test_an_output_cut_anywhere_keeps_what_was_said_apart(name: str, plain: bool, embedded: Tokenizer) -> None:
    """Wherever max_tokens cuts: no markup in content, arguments are objects, and a call that was cut is said to be."""
    starts_in = OutputStart.REASONING if name in IN_THINKING else OutputStart.CONTENT
    pieces = cut(pieces_of(OUTPUTS[name], plain), 1)
    whole = parse_pieces(embedded, pieces, starts_in)
    for length in range(0, len(pieces), 2):
        message = parse_pieces(embedded, pieces[:length], starts_in)
        said = "".join(text for text, _ in pieces[:length])
        if not whole.unparsed:
            assert "DSML" not in message.content
        assert all(isinstance(json.loads(call.arguments), dict) for call in message.tool_calls)
        if not all(call.complete for call in message.tool_calls):
            assert message.malformed or name == "body as JSON"  # of that, the object is whole where only tags are cut
        if not message.tool_calls and not message.malformed and END_THINK not in said:
            assert message.reasoning + message.content == said


@settings(max_examples=200, deadline=None)
@given(pieces=OUTPUT, starts_in=st.sampled_from(OutputStart), size=st.integers(1, 5))
def test_cuts_do_not_matter_where_spelled_marks_are_text(
    pieces: list[tuple[str, bool]], starts_in: OutputStart, size: int, embedded: Tokenizer
) -> None:
    def read(pieces: list[tuple[str, bool]]) -> ParsedMessage:
        parser = ChatParser(embedded, starts_in, spelled_marks=False)
        deltas = [delta for text, special in pieces for delta in parser.push_piece(text, special)]
        return collect([*deltas, *parser.finish()], parser.malformed, parser.unparsed)

    assert read(pieces) == read(cut(pieces, size))


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(max_size=6) | st.sampled_from(["é", "你好", "🙂", "\n\n<", "</"]), max_size=6))
def test_ids_one_by_one_give_what_their_text_gives(texts: list[str], embedded: Tokenizer) -> None:
    """Characters that span tokens, before and behind control tokens."""
    parser = ChatParser(embedded, OutputStart.REASONING)
    said = [
        *embedded.encode_text("".join(texts)),
        embedded.special_id(END_THINK),
        *embedded.encode_text("".join(texts)),
    ]
    message = collect([*parser.push_all(said), *parser.finish()], parser.malformed, parser.unparsed)
    pieces = [("".join(texts), False), (END_THINK, True), ("".join(texts), False)]
    assert message == parse_pieces(embedded, pieces, OutputStart.REASONING)


def test_arguments_come_while_they_are_generated(embedded: Tokenizer) -> None:
    parser = ChatParser(embedded, OutputStart.CONTENT)
    head = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="write">\n<｜DSML｜parameter name="text" string="true">'
    deltas = [delta for text, special in pieces_of(head) for delta in parser.push_piece(text, special)]
    assert deltas == [ToolCallStart(0, "write"), ToolCallArguments(0, '{"text": "')]
    assert parser.push_piece('one "two"') == [ToolCallArguments(0, 'one \\"two\\"')]


def test_required_tool_choice_starts_inside_the_block(embedded: Tokenizer) -> None:
    message = parse_pieces(embedded, pieces_of(f"{CALL}</｜DSML｜tool_calls>"), OutputStart.TOOL_CALLS)
    assert [json.loads(call.arguments) for call in message.tool_calls] == [ARGUMENTS]
    assert not message.malformed
    prose = parse_pieces(embedded, [("I would rather not.", False)], OutputStart.TOOL_CALLS)
    assert prose.content == "I would rather not." and prose.malformed


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"'), min_size=1, max_size=10)
TEXTS = st.text(max_size=20) | st.sampled_from([DSML, THINK, END_THINK, f"\n</{DSML}parameter>\n", f"<{DSML}invoke"])


@settings(max_examples=200, deadline=None)
@given(
    reasoning=TEXTS,
    content=st.text(st.characters(codec="utf-8", exclude_characters="|｜"), max_size=20),
    name=NAMES,
    arguments=st.dictionaries(NAMES, TEXTS | JSON_VALUES, max_size=4),
)
def test_render_parse_render_is_stable(
    reasoning: str, content: str, name: str, arguments: dict[str, object], embedded: Tokenizer
) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}]
    options = ChatOptions(tools=[{"type": "function", "function": {"name": "f"}}])
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": calls}
    follow_up = {"role": "tool", "tool_call_id": "1", "content": "ok"}
    prompt = encode_chat([question], embedded, options)
    conversation = [question, answer, follow_up]
    output = encode_chat(conversation, embedded, options).token_ids[len(prompt.token_ids) :]
    output = output[: output.index(embedded.eos_id)]
    message = parse_message(output, embedded, prompt.starts_in)
    assert message.reasoning == reasoning
    assert (message.content, message.malformed) == (content, False)
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [(name, arguments)]
    again = [dict(calls[0], function={"name": name, "arguments": message.tool_calls[0].arguments})]
    second = {**answer, "reasoning_content": message.reasoning, "content": message.content, "tool_calls": again}
    assert chat_segments([question, second, follow_up], options) == chat_segments(conversation, options)


def test_control_tokens_without_meaning_say_nothing(embedded: Tokenizer) -> None:
    """They would come back from the client as text that spells them."""
    before, after = embedded.encode_text("a"), embedded.encode_text("b <｜User｜>")
    for text in embedded.special_texts:
        if text not in (DSML, THINK, END_THINK):
            message = parse_message([*before, embedded.special_id(text), *after], embedded)
            assert (message.content, message.malformed) == ("ab <｜User｜>", False)
