"""Grammars of JSON and of DSML calls: every sentence of one parses to calls or JSON that follow the schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thalweg.text.chat import OutputStart
from thalweg.text.dsml_grammar import BlockStart, Function, Values, calls_grammar, values_of
from thalweg.text.grammar import Grammar, GrammarCompiler, GrammarTextError, json_term
from thalweg.text.markers import DSML
from thalweg.text.parse import parse_message
from thalweg.text.schema import faults
from thalweg.text.tokenizer import Tokenizer

SEARCH = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 5},
        "mode": {"$ref": "#/$defs/Mode"},
        "tag": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    },
    "required": ["query"],
    "$defs": {"Mode": {"enum": ["fast", "all\nof <it>"], "type": "string"}},
}
FIVE = {
    "type": "object",
    "properties": {f"p{i}": {"type": kind} for i, kind in enumerate(("string", "integer", "boolean", "null", "array"))},
    "required": ["p0", "p4"],
    "additionalProperties": False,
}
FUNCTIONS = [
    Function("search", SEARCH),
    Function("five", FIVE),
    Function("now", {"type": "object", "properties": {}, "additionalProperties": False}),
    Function("wild", {}),
    Function("code", {"properties": {"id": {"type": "string", "pattern": "^[a-c]{2}$"}}, "required": ["id"]}),
]
CHECKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "search": lambda a: (
        isinstance(a.pop("query"), str)
        and a.pop("limit", 1) in range(1, 6)
        and a.pop("mode", "fast") in ("fast", "all\nof <it>")
        and (lambda tag: tag is None or len(tag) <= 3)(a.pop("tag", None))
        and not a
    ),
    "five": lambda a: isinstance(a["p0"], str) and isinstance(a["p4"], list) and a.keys() <= FIVE["properties"].keys(),
    "now": lambda a: not a,
    "wild": lambda a: True,
    "code": lambda a: len(a["id"]) == 2 and set(a["id"]) <= set("abc") and len(a) == 1,
}


@pytest.fixture(scope="module")
def compiler(embedded: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(embedded)


def ids_of(text: str, tokenizer: Tokenizer, name: str = "") -> list[int]:
    """Ids of a text in which § is the DSML control token and ☃ a name in ordinary text."""
    ids: list[int] = []
    for place, part in enumerate(text.split("§")):
        ids += ([tokenizer.special_id(DSML)] if place else []) + tokenizer.encode_text(part.replace("☃", name))
    return ids


def accepts(grammar: Grammar, text: str, tokenizer: Tokenizer) -> bool:
    run = grammar.start()
    for token in ids_of(text, tokenizer):
        if not run.allowed()[token >> 3] >> (token & 7) & 1:
            return False
        run.consume(token)
    return run.can_end


def wandering(grammar: Grammar, tokenizer: Tokenizer, seed: int, most: int = 800) -> list[int]:
    """A random sentence of a grammar, one that likes to close what is open; empty if it found no end."""
    rng = np.random.default_rng(seed)
    run, ids = grammar.start(), []
    by_text = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    while not run.over and len(ids) < most and not (run.can_end and rng.random() < 0.3):
        allowed = np.unpackbits(np.frombuffer(run.allowed(), np.uint8), bitorder="little")[: tokenizer.vocab_size] > 0
        allowed[tokenizer.eos_id] = False
        behind_bracket = bool(ids) and tokenizer.token_bytes(ids[-1]).endswith(b"<")
        closers = [DSML.encode(), b"/"] if behind_bracket else [DSML.encode(), b"<", b'"', b"}", b"]"]
        good = [by_text[text] for text in closers if text in by_text and allowed[by_text[text]]]
        likely = rng.random() < (0.9 if behind_bracket or DSML.encode() in map(tokenizer.token_bytes, good) else 0.25)
        ids.append(int(rng.choice(good if good and likely else np.flatnonzero(allowed))))
        run.consume(ids[-1])
    return ids if run.can_end else []


def block(compiler: GrammarCompiler, tokenizer: Tokenizer, functions: list[Function], **options: Any) -> Grammar:
    start = options.pop("start", BlockStart.TAG)
    options = {"several": True, **options}
    return compiler.compile(calls_grammar(functions, tokenizer.special_id(DSML), start, **options))


def test_every_sentence_is_calls_that_follow_their_schemas(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    grammar = block(compiler, embedded, FUNCTIONS)
    seen: dict[str, int] = {}
    for seed in range(60):
        ids = wandering(grammar, embedded, seed)
        if not ids:
            continue
        message = parse_message(ids, embedded, OutputStart.TOOL_CALLS)
        duplicated = "wild" in {call.name for call in message.tool_calls}  # any names, so also one twice
        assert not message.content and (duplicated or not message.malformed), embedded.decode(ids)
        for call in message.tool_calls:
            assert call.complete and CHECKS[call.name](json.loads(call.arguments)), call
            seen[call.name] = seen.get(call.name, 0) + 1
    assert seen.keys() == CHECKS.keys()


def parameter(name: str, string: str, value: str) -> str:
    return f'<§parameter name="{name}" string="{string}">{value}</§parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<§invoke name="{name}">\n{"".join(parameters)}</§invoke>\n'


QUERY = parameter("query", "true", "a </b> ｜DSML｜ </think>")


@pytest.mark.parametrize(
    ("body", "fine"),
    [
        (invoke("search", QUERY), True),
        (invoke("search", parameter("query", "true", "")), True),
        (invoke("search", parameter("limit", "false", "3"), QUERY, parameter("tag", "false", "null")), True),
        (invoke("search", QUERY, parameter("mode", "true", "all\nof <it>")), True),
        (invoke("search", QUERY) + invoke("now"), True),
        (invoke("search"), False),
        (invoke("search", QUERY, QUERY), False),
        (invoke("search", QUERY, parameter("limit", "false", "6")), False),
        (invoke("search", QUERY, parameter("limit", "true", "3")), False),
        (invoke("search", QUERY, parameter("tag", "true", "abcd")), False),
        (invoke("search", QUERY, parameter("mode", "true", "slow")), False),
        (invoke("search", QUERY, parameter("other", "true", "x")), False),
        (invoke("unknown"), False),
        (invoke("wild", parameter("any", "true", "x"), parameter("thing", "false", '{"a": [1]}')), True),
        (invoke("code", parameter("id", "true", "ab")), True),
        (invoke("code", parameter("id", "true", "abc")), False),
        ("", False),
    ],
)
def test_which_blocks_are_sentences(body: str, fine: bool, compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    grammar = block(compiler, embedded, FUNCTIONS)
    assert accepts(grammar, f"{body}</§tool_calls>", embedded) is fine


def test_openings_and_a_single_call(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    now = [FUNCTIONS[2]]
    one, end = invoke("now"), "</§tool_calls>"
    for start, opening in (
        (BlockStart.NOTHING, "\n\n<§tool_calls>\n"),
        (BlockStart.MARK, "tool_calls>\n"),
        (BlockStart.TAG, ""),
    ):
        single = block(compiler, embedded, now, start=start, several=False)
        assert accepts(single, opening + one + end, embedded)
        assert not accepts(single, opening + one + one + end, embedded)
    either = block(compiler, embedded, now, start=BlockStart.NOTHING, instead=json_term({"type": "object"}))
    assert accepts(either, '{"a": 1}', embedded) and accepts(either, "\n\n<§tool_calls>\n" + one + end, embedded)
    assert not accepts(either, "text", embedded)


@pytest.mark.parametrize("which", ["official", "embedded"])
def test_names_and_values_that_spell_control_tokens_are_text(which: str, request: pytest.FixtureRequest) -> None:
    """Every control string as a function's name, a parameter's name and a constant."""
    tokenizer: Tokenizer = request.getfixturevalue(which)
    compiler = GrammarCompiler(tokenizer)
    texts = [text for text in tokenizer.special_texts if "holder" not in text]
    for name in texts:
        schema = {"type": "object", "properties": {name: {"const": name}}, "required": [name]}
        grammar = block(compiler, tokenizer, [Function(name, schema)])
        said = ids_of(invoke("☃", parameter("☃", "true", "☃")) + "</§tool_calls>", tokenizer, name)
        run = grammar.start()
        for token in said:
            run.consume(token)
        assert run.over
        (call,) = parse_message(said, tokenizer, OutputStart.TOOL_CALLS).tool_calls
        assert (call.name, json.loads(call.arguments)) == (name, {name: name})


ANY = "/(?s:.*)/"


@pytest.mark.parametrize(
    ("schema", "texts", "schemas"),
    [
        ({"type": "string"}, 1, 0),
        ({"type": "string", "description": "x", "minLength": 2}, 1, 0),
        ({"type": ["string", "null"]}, 1, 1),
        ({"type": "integer"}, 0, 1),
        ({}, 1, 1),
        (True, 1, 1),
        (False, 0, 1),
        ({"enum": ["a", 1, "b"]}, 2, 1),
        ({"enum": ["a", 1], "type": "string"}, 1, 1),
        ({"const": "a"}, 1, 0),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}, 1, 2),
        ({"allOf": [{"type": "string"}]}, 1, 0),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, 0, 1),
        ({"type": "string", "pattern": "a|b"}, 0, 1),
        ({"properties": {"a": {}}}, 0, 1),
        ({"$ref": "#/$defs/nothing"}, 0, 1),
    ],
)
def test_strings_are_raw_text_and_the_rest_json(schema: Any, texts: int, schemas: int) -> None:
    values = values_of(schema, {})
    assert isinstance(values, Values)
    assert (len(values.texts), len(values.schemas)) == (texts, schemas)


def test_json_follows_its_schema(compiler: GrammarCompiler, embedded: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"type": "integer"}}},
        "required": ["name", "ages"],
        "additionalProperties": False,
    }
    grammar = compiler.compile(f"start: {json_term(schema)}\n")
    done = 0
    for seed in range(30):
        ids = wandering(grammar, embedded, seed)
        if ids:
            value = json.loads(embedded.decode(ids))
            assert value.keys() == {"name", "ages"} and all(isinstance(age, int) for age in value["ages"])
            done += 1
    assert done > 10
    assert not accepts(grammar, '{"name":' + "\n" * 3 + '"x", "ages": []}', embedded), "white space without end"


@pytest.mark.parametrize(
    ("schema", "path", "wrong"),
    [
        ({"type": "strng"}, "s.type", True),
        ({"properties": {"a": {"items": {"type": 3}}}}, "s.properties.a.items.type", True),
        ({"properties": []}, "s.properties", True),
        ({"required": "a"}, "s.required", True),
        ({"anyOf": [{}, {"enum": []}]}, "s.anyOf[1].enum", True),
        ({"allOf": []}, "s.allOf", True),
        ({"$ref": "#/$defs/A"}, "s.$ref", True),
        ({"$ref": "http://x/y"}, "s.$ref", True),
        ({"minLength": -1}, "s.minLength", True),
        ({"additionalProperties": 3}, "s.additionalProperties", True),
        ({"items": {"not": {}}}, "s.items.not", False),
        ({"uniqueItems": True}, "s.uniqueItems", False),
        ([], "s", True),
    ],
)
def test_faults_of_schemas_are_named_by_path(schema: Any, path: str, wrong: bool) -> None:
    fault = next(faults(schema, "s"))
    assert (fault.path, fault.wrong) == (path, wrong) and fault.words


def test_schemas_without_faults() -> None:
    assert not list(faults({"type": "object", "x-own": 1, "uniqueItems": False, **SEARCH}, "s"))
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"items": deep}
    assert "nested" in next(faults(deep, "s")).words
    looping = {"$defs": {"A": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"}
    assert not list(faults(looping, "s")) and values_of(looping, looping).texts == ()


def test_what_cannot_be_compiled_is_said(compiler: GrammarCompiler) -> None:
    for schema, words in (
        ({"not": {}}, "not"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"minimum": 3, "maximum": 2, "type": "integer"}, "minimum"),
    ):
        with pytest.raises(GrammarTextError, match=words):
            compiler.compile(f"start: {json_term(schema)}\n")
    with pytest.raises(GrammarTextError, match="characters"):
        compiler.compile("start: " + '"a" ' * 400_000)
