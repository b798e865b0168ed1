"""Why an answer to a conversation ended, before an API puts it in its own words."""

from __future__ import annotations

from enum import StrEnum

from thalweg.server.generation import Generation
from thalweg.text.parse import ChatParser
from thalweg.types import FinishReason


class Ending(StrEnum):
    """`malformed_tool_call`: the model wrote tool markup that is no call; every API says so by this name."""

    STOP = "stop"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    MALFORMED = "malformed_tool_call"


def ending_of(generation: Generation, finish: FinishReason) -> Ending:
    """The ending of a conversation's generation that finished by itself, by a limit or by a stop string."""
    if finish is not FinishReason.STOP:
        return Ending(finish.value)
    parser = reader_of(generation)
    if parser.malformed:
        return Ending.MALFORMED
    if parser.tool_calls:
        return Ending.TOOL_CALLS
    return Ending.STOP if generation.stop_string is None else Ending.STOP_STRING


def reader_of(generation: Generation) -> ChatParser:
    """What reads a conversation's answer."""
    parser = generation.reader
    assert isinstance(parser, ChatParser), "a conversation's answer was read by something else"
    return parser
