"""An answer as runs of one kind each: Messages calls them content blocks, Responses output items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from thalweg.text.deltas import ContentText, Delta, ReasoningText, ToolCallArguments, ToolCallStart


class RunKind(StrEnum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Run:
    """Number `index` of an answer's runs. A call has a name, and the text of its arguments, one JSON object."""

    kind: RunKind
    index: int
    call: ToolCallStart | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of the run so far."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class RunBegins:
    run: Run


@dataclass(frozen=True, slots=True)
class RunGoesOn:
    """`text` is new, and already part of the run."""

    run: Run
    text: str


@dataclass(frozen=True, slots=True)
class RunEnds:
    run: Run


Step = RunBegins | RunGoesOn | RunEnds


class RunCutter:
    """Cuts deltas into runs: one ends where another begins, or at the end of the answer."""

    def __init__(self) -> None:
        self._open: Run | None = None
        self._begun = 0

    def push(self, deltas: Iterable[Delta]) -> list[Step]:
        """What these deltas begin, add and end."""
        return [step for delta in deltas for step in self._steps(delta)]

    def end(self) -> list[Step]:
        """The end of the last run."""
        run, self._open = self._open, None
        return [] if run is None else [RunEnds(run)]

    def _steps(self, delta: Delta) -> list[Step]:
        if isinstance(delta, ToolCallStart):
            return self._begin(RunKind.CALL, delta)
        if isinstance(delta, ReasoningText):
            return self._add(RunKind.REASONING, delta.text)
        if isinstance(delta, ContentText):
            return self._add(RunKind.TEXT, delta.text)
        return self._add(RunKind.CALL, delta.text) if isinstance(delta, ToolCallArguments) else []

    def _begin(self, kind: RunKind, call: ToolCallStart | None = None) -> list[Step]:
        steps = self.end()
        self._open = Run(kind, self._begun, call)
        self._begun += 1
        return [*steps, RunBegins(self._open)]

    def _add(self, kind: RunKind, text: str) -> list[Step]:
        steps = [] if self._open is not None and self._open.kind is kind else self._begin(kind)
        assert self._open is not None, "a run was begun"
        self._open.pieces.append(text)
        return [*steps, RunGoesOn(self._open, text)]
