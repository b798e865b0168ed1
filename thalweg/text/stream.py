"""Token ids to text one by one, without broken characters, and stop strings found wherever tokens split them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

from thalweg.text.tokenizer import Tokenizer


class TokenStream:
    """Decodes one sequence incrementally; constant work per token.

    The pieces joined equal `Tokenizer.decode` of all ids. A character that spans tokens is held back until its last
    byte; what can no longer become a character comes out as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes; often empty inside a multi-byte character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def push_all(self, tokens: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, tokens)))

    def flush(self) -> str:
        """What is held back, as replacement characters; the stream is then as new."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopMatcher:
    """Cuts a stream of text before the first stop string.

    The first match is the one that is complete first; of several that end together, the longest. Text that may be the
    beginning of a stop string is held back. Work is proportional to text length times the number of stop strings.

    `active` says whether stop strings count yet (min_tokens): text pushed while it is False is never part of a match.
    """

    def __init__(self, stops: Sequence[str], active: Callable[[], bool] = lambda: True) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops if stop]
        self._active = active
        self._lengths = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string; empty after a match."""
        if self.matched is not None:
            return ""
        if not self._stops or not self._active():
            return self.flush() + text
        window = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            self.matched = self._advance(character)
            if self.matched is not None:
                self._held = ""
                return window[: position - len(self.matched)]
        certain = len(window) - max(self._lengths)
        self._held = window[certain:]
        return window[:certain]

    def flush(self) -> str:
        """What was held back, at the end of the stream: it was no stop string after all."""
        text, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return text

    def _advance(self, character: str) -> str | None:
        """Moves every stop string's automaton by one character; returns the longest stop string completed."""
        found: str | None = None
        for place, (stop, borders) in enumerate(self._stops):
            length = self._lengths[place]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            self._lengths[place] = length
            if length == len(stop) and (found is None or length > len(found)):
                found = stop
        return found


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix (as in KMP search)."""
    borders = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[length] != stop[position]:
            length = borders[length - 1]
        length += stop[length] == stop[position]
        borders[position] = length
    return borders
