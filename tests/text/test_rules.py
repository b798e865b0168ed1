"""Phases of an output under rules, and the parser's account of thinking."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.errors import GrammarError
from thalweg.text.chat import OutputStart
from thalweg.text.deltas import ContentText, ReasoningText
from thalweg.text.dsml_grammar import BlockStart, Function, calls_grammar
from thalweg.text.grammar import Grammar, GrammarCompiler, json_term
from thalweg.text.markers import DSML, END_THINK, THINK
from thalweg.text.parse import ChatParser, parse_message
from thalweg.text.rules import ChatRules, RuleTokens
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import AllowedTokens, TokenArray

NOW = Function("now", {"type": "object", "properties": {}, "additionalProperties": False})


@pytest.fixture(scope="module")
def compiler(embedded: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(embedded)


@pytest.fixture(scope="module")
def tokens(embedded: Tokenizer) -> RuleTokens:
    return RuleTokens.of(embedded, (embedded.eos_id, 1))


def array(*ids: int) -> TokenArray:
    return np.array(ids, np.int32)


def calls(compiler: GrammarCompiler, tokens: RuleTokens) -> Grammar:
    return compiler.compile(calls_grammar([NOW], tokens.mark, BlockStart.MARK, several=True))


def may(allowed: AllowedTokens | None, token: int) -> bool:
    if allowed is None:
        return True
    if allowed.forced is not None:
        return token == allowed.forced
    return token not in allowed.banned and (allowed.mask is None or bool(allowed.mask[token >> 3] >> (token & 7) & 1))


def test_a_grammar_begins_behind_the_thinking(
    compiler: GrammarCompiler, embedded: Tokenizer, tokens: RuleTokens
) -> None:
    grammar = compiler.compile(f"start: {json_term({'type': 'object'})}\n")
    state = ChatRules(tokens, OutputStart.REASONING, grammar=grammar).start()
    words, brace = embedded.encode_text("any words } here"), embedded.encode_text("{")
    for token in (*words, tokens.mark, tokens.end_think):
        assert may(state.allowed(array()), token)
    assert not may(state.allowed(array()), embedded.eos_id), "an end inside thinking would leave no answer"
    assert not state.ends_with(embedded.eos_id)
    output = [*words, tokens.end_think]
    answer = state.allowed(array(*output))
    assert may(answer, brace[0]) and not may(answer, tokens.end_think) and not may(answer, words[0])
    assert answer is not None and not answer.may_end
    whole = [*output, *embedded.encode_text("{}")]
    assert may(state.allowed(array(*whole)), embedded.eos_id) and not may(state.allowed(array(*whole)), brace[0])
    assert state.ends_with(embedded.eos_id) and not state.ends_with(brace[0])


def test_a_free_answer_meets_the_grammar_at_its_first_mark(
    compiler: GrammarCompiler, embedded: Tokenizer, tokens: RuleTokens
) -> None:
    rules = ChatRules(tokens, OutputStart.CONTENT, calls=calls(compiler, tokens))
    words, bracket = embedded.encode_text("I look <b>"), embedded.encode_text("<")
    state = rules.start()
    assert may(state.allowed(array()), words[0]) and may(state.allowed(array()), embedded.eos_id)
    assert not may(state.allowed(array(*words)), tokens.mark), "behind anything but a bracket it opens nothing"
    output = [*words, *bracket]
    assert may(state.allowed(array(*output)), tokens.mark) and may(state.allowed(array(*output)), words[0])
    assert not state.ends_with(embedded.eos_id), "outside of the grammar the sampling says what ends"
    output += [
        tokens.mark,
        *embedded.encode_text("tool_calls>\n<"),
        tokens.mark,
        *embedded.encode_text('invoke name="'),
    ]
    for token in embedded.encode_text("other"):
        assert not may(state.allowed(array(*output)), token) or token in embedded.encode_text("now")
    output += embedded.encode_text('now">\n</')
    output += [tokens.mark, *embedded.encode_text("invoke>\n</"), tokens.mark, *embedded.encode_text("tool_calls>")]
    end = rules.start().allowed(array(*output))
    assert end == AllowedTokens(forced=embedded.eos_id) == state.allowed(array(*output))
    message = parse_message(output, embedded)
    assert [call.name for call in message.tool_calls] == ["now"] and not message.malformed


def test_tokens_that_the_grammar_refuses_are_an_error(
    compiler: GrammarCompiler, embedded: Tokenizer, tokens: RuleTokens
) -> None:
    grammar = compiler.compile(f"start: {json_term({'type': 'object'})}\n")
    with pytest.raises(GrammarError, match="grammar"):
        ChatRules(tokens, OutputStart.CONTENT, grammar=grammar).start().allowed(array(*embedded.encode_text("no")))


@settings(max_examples=60, deadline=None)
@given(budget=st.integers(0, 5), said=st.lists(st.integers(300, 900), max_size=8))
def test_a_budget_forces_the_close_once(budget: int, said: list[int], embedded: Tokenizer) -> None:
    tokens = RuleTokens.of(embedded, ())
    state = ChatRules(tokens, OutputStart.REASONING, thinking_budget=budget).start()
    output: list[int] = []
    for token in said:
        allowed = state.allowed(array(*output))
        output.append(token if allowed is None or allowed.forced is None else allowed.forced)
    assert output.count(tokens.end_think) == (len(said) > budget)
    assert output[:budget] == said[:budget] and output[budget + 1 :] == said[budget + 1 :]
    parser = ChatParser(embedded, OutputStart.REASONING)
    parser.push_all(output)
    assert parser.reasoning_tokens == min(budget, len(said))


def test_rules_without_thinking_have_no_budget(tokens: RuleTokens) -> None:
    state = ChatRules(tokens, OutputStart.CONTENT, thinking_budget=0).start()
    assert state.allowed(array()) is None and state.allowed(array(5, 6)) is None


BLOCK = '\n\n<§tool_calls>\n<§invoke name="f">\n</§invoke>\n</§tool_calls>'


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("so it is¶The answer", "so it is"),
        ("so it is", "so it is"),
        (f"I write{BLOCK}\nbut no¶Well", f"I write{BLOCK}\nbut no"),
        (f"I write{BLOCK}¶Well", f"I write{BLOCK}"),
        ("¶Well", ""),
        ("a § b¶c", "a § b"),
    ],
)
def test_reasoning_tokens_are_those_of_the_reasoning(text: str, counted: str, embedded: Tokenizer) -> None:
    def ids(text: str) -> list[int]:
        marks = {"§": embedded.special_id(DSML), "¶": embedded.special_id(END_THINK)}
        result: list[int] = []
        for part in text.replace("§", "\0§\0").replace("¶", "\0¶\0").split("\0"):
            result += [marks[part]] if part in marks else embedded.encode_text(part)
        return result

    parser = ChatParser(embedded, OutputStart.REASONING)
    parser.push_all(ids(text))
    parser.finish()
    assert parser.reasoning_tokens == len(ids(counted))


def test_a_block_in_thinking_that_never_closes_is_no_reasoning(embedded: Tokenizer) -> None:
    mark = embedded.special_id(DSML)
    before = embedded.encode_text("I must look.")
    output = list(before)
    for place, part in enumerate(BLOCK.split("§")):
        output += ([mark] if place else []) + embedded.encode_text(part)
    parser = ChatParser(embedded, OutputStart.REASONING)
    parser.push_all(output)
    parser.finish()
    # The line breaks and the tag's beginning cannot be told from reasoning before the tag is whole.
    assert parser.tool_calls == 1 and len(before) <= parser.reasoning_tokens < len(output) - 10


TRICKY = [
    "｜DSML｜",
    "<｜DSML｜tool_calls>",
    "<|DSML|invoke",
    "</think>",
    "<think>",
    "\n\n<",
    "</",
    "｜D",
    "|",
    "é",
    " ",
]


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.sampled_from(TRICKY) | st.text(max_size=3), max_size=8), starts_in=st.sampled_from(OutputStart)
)
def test_content_under_a_grammar_is_shown_to_the_letter(
    texts: list[str], starts_in: OutputStart, embedded: Tokenizer
) -> None:
    """A string of a JSON answer may spell markup: cutting it out would leave no JSON."""
    value = json.dumps({"text": "".join(texts)}, ensure_ascii=False).encode("utf-8", "replace").decode()
    output = embedded.encode_text(value)
    if starts_in is OutputStart.REASONING:
        output = [*embedded.encode_text("hm"), embedded.special_id(END_THINK), *output]
    parser = ChatParser(
        embedded, starts_in if starts_in is not OutputStart.TOOL_CALLS else OutputStart.CONTENT, spelled_marks=False
    )
    deltas = [*parser.push_all(output), *parser.finish()]
    assert "".join(delta.text for delta in deltas if isinstance(delta, ContentText)) == value
    assert not parser.malformed and not parser.unparsed
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningText))
    assert reasoning == ("hm" if starts_in is OutputStart.REASONING else "")


CONTROLS = [DSML, THINK, END_THINK]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([(text, True) for text in CONTROLS])
        | st.sampled_from(
            ["<", "</", "tool_calls>\n", 'invoke name="f">\n', "parameter>\n", "@", "\n\n", "｜DSML｜"]
        ).map(lambda text: (text, False)),
        max_size=14,
    ),
    starts_in=st.sampled_from(OutputStart),
)
def test_tokens_are_never_counted_twice_or_beyond(
    pieces: list[tuple[str, bool]], starts_in: OutputStart, embedded: Tokenizer
) -> None:
    parser = ChatParser(embedded, starts_in)
    pushed, before = 0, 0
    for text, special in pieces:
        for token in [embedded.special_id(text)] if special else embedded.encode_text(text):
            parser.push(token)
            pushed += 1
            assert before <= parser.reasoning_tokens <= pushed
            before = parser.reasoning_tokens
    parser.finish()
    assert parser.reasoning_tokens == before
