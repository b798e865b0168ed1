"""What a model's output is made of, as it comes: frozen values from the parser to whoever answers the client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningText:
    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; calls are numbered from 0 in the order of the output."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A further piece of a call's arguments; all pieces of a call are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call is over. `complete` is False where the output ended inside it: its arguments are JSON but cut short."""

    index: int
    complete: bool


Delta = ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str
    complete: bool


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole output. `malformed` says that something was markup and could not be understood, or was cut short."""

    reasoning: str
    content: str
    tool_calls: tuple[ParsedCall, ...]
    malformed: bool
    unparsed: str


def collect(deltas: Iterable[Delta], malformed: bool = False, unparsed: str = "") -> ParsedMessage:
    """Joins deltas to a message."""
    deltas = list(deltas)
    names = {delta.index: delta.name for delta in deltas if isinstance(delta, ToolCallStart)}
    ends = {delta.index: delta.complete for delta in deltas if isinstance(delta, ToolCallEnd)}
    pieces: dict[int, list[str]] = {index: [] for index in names}
    for delta in deltas:
        if isinstance(delta, ToolCallArguments):
            pieces[delta.index].append(delta.text)
    return ParsedMessage(
        reasoning="".join(delta.text for delta in deltas if isinstance(delta, ReasoningText)),
        content="".join(delta.text for delta in deltas if isinstance(delta, ContentText)),
        tool_calls=tuple(
            ParsedCall(name, "".join(pieces[index]), ends.get(index, False)) for index, name in names.items()
        ),
        malformed=malformed,
        unparsed=unparsed,
    )
