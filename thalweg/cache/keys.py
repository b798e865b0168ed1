"""What stands for a unit of tokens in the prefix index: equal keys mean equal tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from thalweg.types import TokenArray


class UnitKeys(Protocol):
    """Turns units of a sequence into keys. What a sequence is, its keys alone know: the cache asks for its length."""

    def key(self, tokens: Any, unit: int) -> bytes:
        """Of the unit with this number; of fewer tokens where the sequence ends within it."""
        ...

    def first_keys(self, tokens: Any, units: int) -> Iterable[bytes]:
        """Of the first so many units, made as they are asked for."""
        ...

    def common(self, one: bytes, other: bytes) -> int:
        """With how many equal tokens two units begin, as far as their keys tell."""
        ...


class TokenKeys:
    """The tokens themselves, as int32, little endian."""

    def __init__(self, unit_tokens: int) -> None:
        self._unit_tokens = unit_tokens

    def key(self, tokens: TokenArray, unit: int) -> bytes:
        first = unit * self._unit_tokens
        return np.asarray(tokens[first : first + self._unit_tokens], np.int32).tobytes()

    def first_keys(self, tokens: TokenArray, units: int) -> Iterable[bytes]:
        return (self.key(tokens, unit) for unit in range(units))

    def common(self, one: bytes, other: bytes) -> int:
        count = min(len(one), len(other)) // 4
        different = np.flatnonzero(np.frombuffer(one, np.int32, count) != np.frombuffer(other, np.int32, count))
        return int(different[0]) if len(different) else count
