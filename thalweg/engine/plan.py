"""Values between the scheduler and the runner: what one forward pass computes, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from thalweg.engine.request import Running
from thalweg.errors import ThalwegError
from thalweg.types import SampledToken


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Compute tokens [start, end) of one running sequence; `samples` if a token follows from the last of them."""

    running: Running
    start: int
    end: int
    samples: bool

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def request_id(self) -> str:
        return self.running.sequence.request_id


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a ragged batch."""

    sequences: tuple[SequencePlan, ...]

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.sequences)

    @property
    def decode_tokens(self) -> int:
        """Of `tokens`, those behind their prompt."""
        return sum(s.tokens for s in self.sequences if s.start >= s.running.sequence.prompt_tokens)

    def description(self) -> tuple[tuple[str, int, int, bool], ...]:
        """The plan as plain values, for comparing two engines."""
        return tuple((s.request_id, s.start, s.end, s.samples) for s in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of every sequence that samples, by request id: its token, or why there can be none."""

    sampled: Mapping[str, SampledToken]
    failed: Mapping[str, ThalwegError] = field(default_factory=dict)
