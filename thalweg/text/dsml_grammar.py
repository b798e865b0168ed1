"""The grammar of a block of DSML calls, made from the functions that a request offers.

    block:   <DSML|tool_calls>\\n  invoke…  </DSML|tool_calls>
    invoke:  <DSML|invoke name="f">\\n  parameter…  </DSML|invoke>\\n
    parameter, of a string:  <DSML|parameter name="p" string="true">raw text</DSML|parameter>\\n
    parameter, of the rest:  <DSML|parameter name="p" string="false">JSON</DSML|parameter>\\n

Raw text follows enum, const, pattern and lengths of its schema, JSON all that `text.grammar` can enforce. Up to four
parameters come in any order, more in the order of the schema. Only control tokens end raw text: text that spells
markup is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

from thalweg.text.grammar import json_term, pattern_term, text_term
from thalweg.text.schema import resolved

_MOST_IN_ANY_ORDER = 4
_ANY_TEXT = "/(?s:.*)/"
_ANY_NAME = r'/[^"\x00-\x1f<>]+/'
_DEEPEST = 8  # of unions inside unions
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment", "nullable"})
_TYPES_BUT_STRING = ("number", "boolean", "null", "object", "array")


class BlockStart(StrEnum):
    """How much of the block's opening tag is there before the grammar begins."""

    NOTHING = "nothing"
    MARK = "mark"  # `<` and the control token
    TAG = "tag"  # all of it


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called. `lenient`: keywords that cannot be enforced are left out of account; `loose`: any
    parameters, because nothing of its schema can be enforced."""

    name: str
    parameters: Mapping[str, Any]
    lenient: bool = False
    loose: bool = False

    @property
    def callable(self) -> bool:
        """Whether a tag can carry its name."""
        return can_name(self.name)


@dataclass(frozen=True, slots=True)
class Values:
    """What a parameter may be: terms of raw text, and schemas of JSON values."""

    texts: tuple[str, ...]
    schemas: tuple[Mapping[str, Any] | bool, ...]


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    rule: str
    required: bool


def can_name(name: str) -> bool:
    """Whether the `name` attribute of a tag can carry this name."""
    return '"' not in name and len(name) <= 256


def calls_grammar(
    functions: Sequence[Function], mark: int, start: BlockStart, *, several: bool, instead: str | None = None
) -> str:
    """Lark of a block; `mark` is the id of the DSML control token, `instead` a term that may stand for the block."""
    return _Writer(mark).block(functions, start, several=several, instead=instead)


def values_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> Values:
    """Splits a parameter's schema into what is raw text and what is JSON. `root` holds its definitions."""
    schema = resolved(schema, root)
    if schema is True or (isinstance(schema, Mapping) and schema.keys() <= _ANNOTATIONS):
        return Values((_ANY_TEXT,), ({"type": list(_TYPES_BUT_STRING)},))
    if not isinstance(schema, Mapping):
        return Values((), (bool(schema),))
    said = schema.keys() - _ANNOTATIONS
    for union in ("anyOf", "oneOf", "allOf"):
        single = union != "allOf" or len(schema.get(union, ())) == 1
        if said == {union} and single and depth < _DEEPEST:
            parts = [values_of(part, root, depth + 1) for part in schema[union]]
            texts = dict.fromkeys(text for part in parts for text in part.texts)
            return Values(tuple(texts), tuple(inner for part in parts for inner in part.schemas))
    if "enum" in said or "const" in said:
        return _listed(schema, root)
    kinds = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]
    if "string" not in kinds:
        return Values((), (_whole(schema, root),))
    text = _text_of(schema)
    if text is None or said & {"anyOf", "oneOf", "allOf"}:
        return Values((), (_whole(schema, root),))
    others = [kind for kind in kinds if kind != "string"]
    return Values((text,), (_whole({**schema, "type": others}, root),) if others else ())


def _whole(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with the definitions that its references need."""
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**definitions, **schema}


def _listed(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Values:
    values = [schema["const"]] if "const" in schema else list(schema["enum"])
    kinds = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type", "string")]
    texts = tuple(text_term(value) for value in values if isinstance(value, str)) if "string" in kinds else ()
    others = [value for value in values if not isinstance(value, str)]
    rest = {key: value for key, value in schema.items() if key != "const"}
    return Values(texts, (_whole({**rest, "enum": others}, root),) if others or not texts else ())


def _text_of(schema: Mapping[str, Any]) -> str | None:
    """The term of a string's raw text; None where its pattern cannot be anchored by hand."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    length = f"/(?s:.{{{least},{'' if most is None else most}}})/"
    if "pattern" not in schema:
        return length if least or most is not None else _ANY_TEXT
    whole = _anchored(schema["pattern"])
    if whole is None:
        return None
    return f"({pattern_term(whole)} & {length})" if least or most is not None else pattern_term(whole)


def _anchored(pattern: str) -> str | None:
    """A pattern that is searched for, as one for the whole text."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    if "|" in inner or "^" in inner.replace("[^", "").replace("\\^", "") or "$" in inner.replace("\\$", ""):
        return None
    return f"{'' if begins else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'}"


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, mark: int) -> None:
        self._mark = f"<[{mark}]>"
        self._lines: list[str] = []
        self._names = 0
        self._lenient = False

    def block(self, functions: Sequence[Function], start: BlockStart, *, several: bool, instead: str | None) -> str:
        calls = " | ".join(self._call(function) for function in functions)
        opening = {
            BlockStart.NOTHING: f"{text_term(chr(10) * 2 + '<')} {self._mark} {text_term('tool_calls>' + chr(10))}",
            BlockStart.MARK: text_term("tool_calls>\n"),
            BlockStart.TAG: "",
        }[start]
        body = f"{opening} call{'+' if several else ''} {text_term('</')} {self._mark} {text_term('tool_calls>')}"
        lines = [f"start: block{' | other' if instead else ''}", f"block: {body}", f"call: {calls}"]
        lines += [f"other: {instead}"] if instead else []
        return "\n".join([*lines, *self._lines]) + "\n"

    def _call(self, function: Function) -> str:
        head = text_term(f'invoke name="{function.name}">\n')
        foot = text_term("invoke>\n")
        self._lenient = function.lenient
        parameters = self._any_parameter() + "*" if function.loose else self._parameters(function.parameters)
        rule = f"{text_term('<')} {self._mark} {head} {parameters} {text_term('</')} {self._mark} {foot}"
        return self._rule(rule)

    def _parameters(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        extra = schema.get("additionalProperties", not properties)
        named = {**properties, **{name: extra for name in required if name not in properties}}
        parameters = [
            _Parameter(name, self._parameter(name, values_of(inner, schema)), name in required)
            for name, inner in named.items()
        ]
        more = "" if extra is False else self._any_parameter(values_of(extra, schema)) + "*"
        if len(parameters) <= _MOST_IN_ANY_ORDER:
            return f"{self._in_any_order(parameters)} {more}"
        return " ".join([*(p.rule + ("" if p.required else "?") for p in parameters), more])

    def _in_any_order(self, parameters: Sequence[_Parameter]) -> str:
        """A rule for each set of parameters that are still to come; none comes twice."""
        rules: dict[frozenset[str], str] = {}
        for size in range(len(parameters) + 1):
            for left in combinations(parameters, size):
                names = frozenset(parameter.name for parameter in left)
                ways = [f"{p.rule} {rules[names - {p.name}]}" for p in left]
                if not any(parameter.required for parameter in left):
                    ways.append('""')
                rules[names] = self._rule(" | ".join(ways))
        return rules[frozenset(parameter.name for parameter in parameters)]

    def _any_parameter(self, values: Values | None = None) -> str:
        return self._parameter(None, values or values_of(True, {}))

    def _parameter(self, name: str | None, values: Values) -> str:
        """`<DSML|parameter …>value</DSML|parameter>\\n`; any name for None."""
        head = 'parameter name="' if name is None else f'parameter name="{name}"'
        given = f'{_ANY_NAME} "\\""' if name is None else ""
        ways = []
        if values.texts:
            # One terminal with what closes it: how far raw text goes is decided where the control token comes.
            raw = self._terminal(f"({' | '.join(values.texts)}) {text_term('</')}")
            ways.append(f"{text_term(' string=' + chr(34) + 'true' + chr(34) + '>')} {raw}")
        for schema in values.schemas:
            value = self._rule(json_term(schema, lenient=self._lenient))
            ways.append(f"{text_term(' string=' + chr(34) + 'false' + chr(34) + '>')} {value} {text_term('</')}")
        body = self._rule(" | ".join(ways))
        foot = text_term("parameter>\n")
        return self._rule(f"{text_term('<')} {self._mark} {text_term(head)} {given} {body} {self._mark} {foot}")

    def _rule(self, body: str) -> str:
        return self._named("r", body)

    def _terminal(self, body: str) -> str:
        return self._named("T", body)

    def _named(self, letter: str, body: str) -> str:
        name = f"{letter}{self._names}"
        self._names += 1
        self._lines.append(f"{name}: {body}")
        return name
