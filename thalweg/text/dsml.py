"""DSML, the markup of DeepSeek-V4's tool calls: reading its tags and writing a call's arguments as JSON.

A tag is `<` or `</`, the mark `｜DSML｜`, a word, attributes and `>`. The mark is one control token. In the buffers of
the parser a control token is one lone surrogate: decoded text never holds one, so text that spells a control string
stays different from the token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum

from thalweg.text.markers import DSML, END_THINK, THINK

DSML_MARK = "\ud800"
THINK_MARK = "\ud801"
END_THINK_MARK = "\ud802"

CONTROL_ONLY = re.compile(DSML_MARK)
ANY_SPELLING = re.compile(rf"{DSML_MARK}|｜DSML[｜|]|(?:(?<=<)|(?<=</))\|DSML[｜|]")
# What may be the beginning of a tag whose mark is spelled in plain text, or of one whose mark is still to come.
TAG_BEGINNING = re.compile(r"</?(?:[｜|](?:D(?:S(?:ML?)?)?)?)?\Z")

_WORDS = ("tool_calls", "function_calls", "invoke", "parameter")
_WORD = re.compile("|".join(_WORDS))
_LONGEST_ATTRIBUTES = 1024
_END = re.compile(r"[ \t]*(?:>|(?=[\n<]))")
_END_BEGINNING = re.compile(r"[ \t]*\Z")
_INVOKE = re.compile(r'\s+name\s*=\s*"(?P<name>.*?)"\s*>', re.DOTALL)
_PARAMETER = re.compile(r'\s+name\s*=\s*"(?P<name>.*?)"(?:\s+string\s*=\s*"(?P<string>true|false)")?\s*>', re.DOTALL)
_ATTRIBUTES_BEGINNING = re.compile(r'\s*(?:n(?:a(?:m(?:e(?:\s*(?:=(?:\s*(?:".*)?)?)?)?)?)?)?)?\Z', re.DOTALL)


class Word(StrEnum):
    BLOCK = "tool_calls"
    INVOKE = "invoke"
    PARAMETER = "parameter"


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag at buffer[start:end]. `is_string` is None where a parameter does not say."""

    word: Word
    closing: bool
    start: int
    end: int
    name: str = ""
    is_string: bool | None = None


@dataclass(frozen=True, slots=True)
class NoTag:
    """A mark at buffer[start:end] that begins no tag."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The beginning of a tag, from buffer[start]; more text decides."""

    start: int


def spelled(text: str) -> str:
    """Buffer text as text: control tokens become what they spell."""
    return text.replace(DSML_MARK, DSML).replace(THINK_MARK, THINK).replace(END_THINK_MARK, END_THINK)


def read_tag(buffer: str, mark: re.Match[str]) -> Tag | NoTag | Unfinished:
    """The tag around a mark. What it says of a given text does not change when more text follows."""
    closing = buffer.endswith("</", 0, mark.start())
    opening = not closing and buffer.endswith("<", 0, mark.start())
    start = mark.start() - (2 if closing else 1 if opening else 0)
    no_tag = NoTag(start, mark.end())
    if not (closing or opening):
        return no_tag
    word = _WORD.match(buffer, mark.end())
    if word is None:
        rest = buffer[mark.end() : mark.end() + len("function_calls")]
        return Unfinished(start) if any(known.startswith(rest) for known in _WORDS) else no_tag
    kind = Word.BLOCK if word.group().endswith("_calls") else Word(word.group())
    if closing or kind is Word.BLOCK:
        end = _END.match(buffer, word.end())
        if end is None:
            return Unfinished(start) if _END_BEGINNING.match(buffer, word.end()) else no_tag
        return Tag(kind, closing, start, end.end())
    return _read_attributes(buffer, kind, start, word.end()) or no_tag


def _read_attributes(buffer: str, kind: Word, start: int, position: int) -> Tag | Unfinished | None:
    window = buffer[position : position + _LONGEST_ATTRIBUTES]
    found = (_INVOKE if kind is Word.INVOKE else _PARAMETER).match(window)
    if found is None:
        possible = len(window) < _LONGEST_ATTRIBUTES and _ATTRIBUTES_BEGINNING.match(window)
        return Unfinished(start) if possible else None
    flag = found.groupdict().get("string")
    return Tag(
        kind, False, start, position + found.end(), spelled(found["name"]), None if flag is None else flag == "true"
    )


class ArgumentsWriter:
    """Writes one call's arguments as a JSON object, piece by piece; the pieces joined are valid JSON after `end`."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._is_string = False
        self._raw: list[str] = []

    @property
    def is_empty(self) -> bool:
        return not self._names

    def has(self, name: str) -> bool:
        return name in self._names

    def begin_value(self, name: str, is_string: bool | None) -> str:
        """JSON up to the value. A value that is no string is known to be JSON only at its end."""
        opening = "{" if self.is_empty else ", "
        self._names.add(name)
        self._is_string = is_string is True
        self._raw = []
        return f"{opening}{json.dumps(name, ensure_ascii=False)}: " + ('"' if self._is_string else "")

    def value(self, text: str) -> str:
        """JSON of a further piece of the value."""
        if self._is_string:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._raw.append(text)
        return ""

    def end_value(self) -> str:
        """JSON of what the value still needs. Text that was announced as JSON and is none becomes a string."""
        return '"' if self._is_string else _as_json("".join(self._raw))

    def end(self) -> str:
        """JSON after the last value."""
        return "{}" if self.is_empty else "}"


def read_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict)
    except (ValueError, RecursionError):
        return False


def _as_json(raw: str) -> str:
    text = raw.strip()
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        # Python's spelling of the three constants is the usual slip.
        constants = {"True": "true", "False": "false", "None": "null"}
        return constants.get(text) or json.dumps(raw, ensure_ascii=False)
    return text


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
