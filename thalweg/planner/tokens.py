"""Tokens that nobody has written: a prompt as pieces of texts of which only identity and length are known.

A trace says which parts of two prompts are equal and how long they are. That is all the prefix index asks, so that a
simulated prompt of a million tokens is a list of pieces and the keys of its units.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

import numpy as np

from thalweg.cache.keys import UnitKeys
from thalweg.config.model import UNIT_TOKENS
from thalweg.types import TokenArray

Piece = tuple[int, int]  # (text, tokens): the first so many tokens of the text with this number

_WHOLE = Struct("<qq").pack  # text, offset: a unit within one text
_PART = Struct("<qqq").pack  # text, offset, tokens: a part of a unit
_ENDLESS = 2**62
_ZEROS = np.broadcast_to(np.int32(0), (2**31 - 1,))


def placeholder(tokens: int) -> TokenArray:
    """A prompt of that many zeros, for its length alone. Takes no memory."""
    return _ZEROS[:tokens]


class SyntheticTokens:
    """A KnownTokens of pieces: a prompt, then as much of an output text as was produced so far."""

    __slots__ = ("_begin", "_keys", "_number", "_pieces", "_unit", "count")

    def __init__(self, pieces: tuple[Piece, ...], output: int, unit_tokens: int = UNIT_TOKENS) -> None:
        self.count = sum(tokens for _, tokens in pieces)
        self._pieces = (*pieces, (output, _ENDLESS))
        self._unit = unit_tokens
        self._keys: list[bytes] = []
        self._number = 0  # of the piece in which the next unit begins
        self._begin = 0  # position of that piece's first token

    @property
    def known(self) -> TokenArray:
        """The cache gets these tokens themselves, and reads them by their keys."""
        return self  # type: ignore[return-value]

    def __len__(self) -> int:
        return self.count

    def append(self, token: int) -> None:
        self.count += 1

    def unit_key(self, unit: int) -> bytes:
        """Stands for the tokens of a unit."""
        while len(self._keys) <= unit:
            self._add_key()
        return self._keys[unit]

    def first_keys(self, units: int) -> list[bytes]:
        """Those of the first so many units."""
        while len(self._keys) < units:
            self._add_key()
        return self._keys[:units]

    def _add_key(self) -> None:
        size = self._unit
        position = len(self._keys) * size
        text, tokens = self._pieces[self._number]
        last = self._begin + tokens - size  # where the last unit within this piece may begin
        if position <= last:
            begin = self._begin
            stop = min(last, max(self.count, position)) + 1
            self._keys += [_WHOLE(text, at - begin) for at in range(position, stop, size)]
        else:
            self._keys.append(self._joined(position, position + size))
        position = len(self._keys) * size
        while position >= self._begin + self._pieces[self._number][1]:
            self._begin += self._pieces[self._number][1]
            self._number += 1

    def _joined(self, position: int, end: int) -> bytes:
        parts, number, begin = [], self._number, self._begin
        while position < end:
            text, tokens = self._pieces[number]
            stop = min(end, begin + tokens)
            if stop > position:
                parts.append(_PART(text, position - begin, stop - position))
                position = stop
            number, begin = number + 1, begin + tokens
        return b"".join(parts)


class SyntheticKeys(UnitKeys):
    """Keys of SyntheticTokens. Where two units differ, nobody knows how far into them."""

    def key(self, tokens: SyntheticTokens, unit: int) -> bytes:
        return tokens.unit_key(unit)

    def first_keys(self, tokens: SyntheticTokens, units: int) -> Iterable[bytes]:
        return tokens.first_keys(units)

    def common(self, one: bytes, other: bytes) -> int:
        return 0
