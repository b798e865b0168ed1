"""Traces: what users ask and when, with the parts that their prompts have in common.

A trace is a stream of sessions in order of their start. A session is turns, each asked some time after the answer
before it; a single request is a session of one turn. Files are JSON lines of one of two kinds:

    Mooncake   {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2354]}
               milliseconds; one id for every 512 tokens of the prompt, equal ids for equal beginnings
    sessions   {"start": 1.5, "tenant": "a", "prefix": [["system", 800]], "turns": [
                 {"input_tokens": 120, "output_tokens": 300},
                 {"pause": 8.0, "input_tokens": 60, "output_tokens": 90, "cancel_after": 2.5}]}
               seconds; `prefix` names texts that other sessions may begin with; each turn's prompt is the prefix and
               all turns before, answers included
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from thalweg.errors import ConfigError, nearest
from thalweg.planner.tokens import Piece

MOONCAKE_BLOCK_TOKENS = 512
_MOST_TOKENS = 2**31 - 1
_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_SESSION = ("start", "tenant", "prefix", "turns", "id")
_TURN = ("input_tokens", "output_tokens", "pause", "cancel_after", "priority")


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `pieces` are its whole prompt; its output is text number `output`. `pause` seconds lie between the
    end of the turn before and this one; `cancel_after` seconds after it is asked the client goes away."""

    pieces: tuple[Piece, ...]
    output: int
    output_tokens: int
    pause: float = 0.0
    cancel_after: float | None = None
    hints: tuple[int, ...] = ()  # prompt positions at which other prompts are likely to diverge
    priority: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.pieces)


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one user. `start` is when the first is asked, in seconds from the trace's begin."""

    name: str
    start: float
    turns: tuple[Turn, ...]
    tenant: str = ""


class Texts:
    """Gives numbers to texts: the same for the same name, a new one without a name."""

    def __init__(self) -> None:
        self._numbers = count()
        self._named: dict[tuple[str, str | int], int] = {}

    def new(self) -> int:
        return next(self._numbers)

    def named(self, kind: str, name: str | int) -> int:
        number = self._named.get((kind, name))
        if number is None:
            number = self._named[kind, name] = self.new()
        return number


def conversation(
    texts: Texts,
    prefix: tuple[Piece, ...],
    asked: list[tuple[int, int, float]],
    cancel: Mapping[int, float] | None = None,
) -> tuple[Turn, ...]:
    """Turns of (input tokens, output tokens, pause), each after all that was said before. `cancel` maps numbers of
    turns to the seconds after which their client goes away."""
    said, turns = prefix, []
    shared = sum(tokens for _, tokens in prefix)
    hints = (shared,) if shared else ()
    for number, (inputs, outputs, pause) in enumerate(asked):
        said = (*said, (texts.new(), inputs)) if inputs else said
        output = texts.new()
        turns.append(Turn(said, output, outputs, pause, (cancel or {}).get(number), hints))
        said = (*said, (output, outputs))
    return tuple(turns)


def read_trace(path: str | Path) -> Iterator[Session]:
    """The sessions of a file, line by line. Raises ConfigError naming line and field."""
    file, texts, last = Path(path), Texts(), -math.inf
    try:
        lines = file.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"trace: {file} cannot be read: {error.strerror}", param="trace") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            session = _Line(file.name, number, line).session(texts)
            if session.start < last:
                _refuse(file.name, number, f"starts at {session.start:g} s, before the line above it ({last:g} s)")
            last = session.start
            yield session
    if last == -math.inf:
        raise ConfigError(f"trace: {file} has no lines", param="trace")


def _refuse(file: str, line: int, what: str) -> NoReturn:
    raise ConfigError(f"trace: {file} line {line}: {what}", param="trace")


class _Line:
    """One line of a trace file."""

    def __init__(self, file: str, number: int, text: str) -> None:
        self._file, self._number = file, number
        try:
            value = json.loads(text)
        except ValueError as error:
            self.refuse(f"no JSON: {error}")
        if not isinstance(value, dict):
            self.refuse("not a JSON object")
        self._fields: dict[str, Any] = value

    def refuse(self, what: str) -> NoReturn:
        _refuse(self._file, self._number, what)

    def session(self, texts: Texts) -> Session:
        return self._mooncake(texts) if "hash_ids" in self._fields else self._own(texts)

    def _mooncake(self, texts: Texts) -> Session:
        fields = self._fields
        self._check_names(fields, _MOONCAKE, "")
        start = self._number_of(fields, "timestamp") / 1000
        prompt = self._tokens(fields, "input_length", 1)
        ids = fields["hash_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            self.refuse("hash_ids: not a list of whole numbers")
        if len(ids) != -(-prompt // MOONCAKE_BLOCK_TOKENS):
            self.refuse(
                f"hash_ids: {len(ids)} ids for input_length {prompt}; one for every {MOONCAKE_BLOCK_TOKENS} tokens "
                f"are {-(-prompt // MOONCAKE_BLOCK_TOKENS)}"
            )
        sizes = [MOONCAKE_BLOCK_TOKENS] * (len(ids) - 1) + [prompt - MOONCAKE_BLOCK_TOKENS * (len(ids) - 1)]
        pieces = tuple((texts.named("hash", i), size) for i, size in zip(ids, sizes, strict=True))
        turn = Turn(pieces, texts.new(), self._tokens(fields, "output_length", 1))
        return Session(f"line-{self._number}", start, (turn,))

    def _own(self, texts: Texts) -> Session:
        fields = self._fields
        self._check_names(fields, _SESSION, "")
        tenant = fields.get("tenant", "")
        if not isinstance(tenant, str):
            self.refuse("tenant: not a text")
        turns = fields.get("turns")
        if not isinstance(turns, list) or not turns:
            self.refuse("turns: not a list of at least one turn")
        asked, cancel, priorities = [], {}, []
        for place, turn in enumerate(turns):
            where = f"turns[{place}]."
            if not isinstance(turn, dict):
                self.refuse(f"turns[{place}]: not a JSON object")
            self._check_names(turn, _TURN, where)
            inputs = self._tokens(turn, "input_tokens", 0, where)
            pause = self._number_of(turn, "pause", where) if "pause" in turn else 0.0
            asked.append((inputs, self._tokens(turn, "output_tokens", 1, where), pause))
            priorities.append(self._priority(turn, where))
            if "cancel_after" in turn:
                cancel[place] = self._number_of(turn, "cancel_after", where)
        prefix = self._prefix(texts, tenant)
        if not prefix and asked[0][0] == 0:
            self.refuse("turns[0].input_tokens: 0 without a prefix; a prompt has at least one token")
        name = fields.get("id", f"line-{self._number}")
        if not isinstance(name, str):
            self.refuse("id: not a text")
        made = conversation(texts, prefix, asked, cancel)
        made = tuple(_with_priority(turn, p) for turn, p in zip(made, priorities, strict=True))
        return Session(name, self._number_of(fields, "start"), made, tenant)

    def _prefix(self, texts: Texts, tenant: str) -> tuple[Piece, ...]:
        prefix = self._fields.get("prefix", [])
        if not isinstance(prefix, list):
            self.refuse("prefix: not a list of [name, tokens]")
        pieces = []
        for place, part in enumerate(prefix):
            if not (isinstance(part, list) and len(part) == 2 and isinstance(part[0], str)):
                self.refuse(f"prefix[{place}]: not [name, tokens]")
            pieces.append((texts.named("prefix", part[0]), self._tokens({"tokens": part[1]}, "tokens", 1, "prefix: ")))
        return tuple(pieces)

    def _check_names(self, fields: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        for name in fields:
            if name not in known:
                self.refuse(f"{where}{name}: no such field{nearest(name, known)}")

    def _number_of(self, fields: Mapping[str, Any], name: str, where: str = "") -> float:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.refuse(f"{where}{name}: {value!r} is not a number of at least 0")
        return float(value)

    def _tokens(self, fields: Mapping[str, Any], name: str, least: int, where: str = "") -> int:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_TOKENS:
            self.refuse(f"{where}{name}: {value!r} is not a whole number from {least} to {_MOST_TOKENS}")
        return value

    def _priority(self, turn: Mapping[str, Any], where: str) -> int:
        value = turn.get("priority", 0)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(f"{where}priority: {value!r} is not a whole number")
        return value


def _with_priority(turn: Turn, priority: int) -> Turn:
    if priority == 0:
        return turn
    return Turn(turn.pieces, turn.output, turn.output_tokens, turn.pause, turn.cancel_after, turn.hints, priority)
