"""A prompt as control strings and plain text, kept apart until each has become tokens by its own way."""

from __future__ import annotations

import re
from dataclasses import dataclass

from thalweg.text.markers import DSML, END_THINK, THINK
from thalweg.text.tokenizer import Tokenizer

_CONTROL_IN_FIXED_TEXT = re.compile("|".join(map(re.escape, (DSML, THINK, END_THINK))))


@dataclass(frozen=True, slots=True)
class Segment:
    """Either one control string (exactly one token) or plain text (tokenised without control tokens)."""

    text: str
    control: bool


class PromptBuilder:
    """Collects a prompt's parts and the places where later prompts are likely to differ.

    Neighbouring plain parts are tokenised as one text, as the published encoder does it; only control strings and
    the prompt's ends cut text.
    """

    def __init__(self) -> None:
        self._finished: list[Segment] = []
        self._plain: list[str] = []
        self._marks: list[tuple[int, int]] = []

    def plain(self, text: str) -> None:
        """Appends text that may hold anything: user, tool and model text."""
        if text:
            self._plain.append(text)

    def control(self, text: str) -> None:
        """Appends one control string of `thalweg.text.markers`."""
        self._close_plain()
        self._finished.append(Segment(text, control=True))

    def fixed(self, text: str) -> None:
        """Appends one of the encoder's own texts; the control strings spelled in it are meant as such."""
        position = 0
        for match in _CONTROL_IN_FIXED_TEXT.finditer(text):
            self.plain(text[position : match.start()])
            self.control(match.group())
            position = match.end()
        self.plain(text[position:])

    def mark(self) -> None:
        """Notes that later prompts are likely to differ from here on."""
        self._marks.append((len(self._finished), sum(map(len, self._plain))))

    def segments(self) -> list[Segment]:
        """All parts so far, plain ones merged."""
        self._close_plain()
        return list(self._finished)

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], tuple[int, ...]]:
        """Token ids and the marks as token positions, ascending; a mark inside plain text counts from its start."""
        segments = self.segments()
        plain_ids = iter(tokenizer.encode_texts([segment.text for segment in segments if not segment.control]))
        token_ids: list[int] = []
        starts: list[int] = []
        for segment in segments:
            starts.append(len(token_ids))
            token_ids += [tokenizer.special_id(segment.text)] if segment.control else next(plain_ids)
        starts.append(len(token_ids))
        return token_ids, tuple(sorted({starts[self._segment_after(*mark)] for mark in self._marks}))

    def _segment_after(self, finished: int, plain_length: int) -> int:
        whole = plain_length > 0 and len(self._finished[finished].text) == plain_length
        return finished + 1 if whole else finished

    def _close_plain(self) -> None:
        if self._plain:
            self._finished.append(Segment("".join(self._plain), control=False))
            self._plain = []
