"""What a workload asks of an endpoint: its sessions, and the few sums of them that closed forms take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from thalweg.errors import ConfigError
from thalweg.planner.trace import Session, Turn, read_trace
from thalweg.planner.workload import copies, own_rate, workload_sessions

OWN_PROFILE = {
    "long-context-agents": "long-agents",
    "coding-agents": "coding-agents",
    "short-chat": "short-chat",
    "rl-rollouts": "rollouts",
    "mixed": "mixed",
}
_SHORT, _LONG_ANSWER, _WIDE = 8_192, 2_000, 20.0  # tokens of a median prompt and answer; p90 prompt over the median


@dataclass(frozen=True, slots=True)
class Demand:
    """Sessions, and sums over their turns. Tokens are means of a request; `reused_tokens` is what an endless cache
    would have of a prompt. `rate` is requests, `session_rate` sessions per second; `profile` the nearest one."""

    name: str
    sessions: tuple[Session, ...]
    requests: int
    prompt_tokens: float
    reused_tokens: float
    output_tokens: float
    longest_tokens: int
    typical_tokens: int
    rate: float
    session_rate: float
    profile: str

    @property
    def new_tokens(self) -> float:
        """Of a prompt, at least one."""
        return max(1.0, self.prompt_tokens - self.reused_tokens)

    @property
    def hit_rate(self) -> float:
        """Of an endless cache."""
        return self.reused_tokens / self.prompt_tokens


def demand_of(
    *, trace: Path | None = None, workload: str | None = None, requests: int = 300, seed: int = 0,
    rate: float | None = None,
) -> Demand:  # fmt: skip
    """The first so many requests of a trace, or of a shape. Raises ConfigError."""
    if (trace is None) == (workload is None):
        raise ConfigError("trace: give a trace file or --workload, one of them", param="trace")
    if trace is not None:
        if rate is not None:
            raise ConfigError("rate: a trace has its own times; --rate is for workloads", param="rate")
        return summed(trace.name, _first(read_trace(trace), requests))
    assert workload is not None, "checked above"
    sessions = tuple(workload_sessions(workload, requests, seed, rate))
    return summed(workload, sessions, (rate or own_rate(workload)) * copies(workload))


def _first(sessions: Iterable[Session], requests: int) -> tuple[Session, ...]:
    found, left = [], requests
    for session in islice(sessions, requests):
        if left <= 0:
            break
        kept = session.turns[:left]
        found.append(Session(session.name, session.start, kept, session.tenant))
        left -= len(kept)
    return tuple(found)


def summed(name: str, sessions: Sequence[Session], session_rate: float | None = None) -> Demand:
    """The sums; without a rate, that of the sessions' starts. Raises ConfigError for a trace without requests."""
    turns = [turn for session in sessions for turn in session.turns]
    if not turns:
        raise ConfigError("trace: it has no requests", param="trace")
    prompts = np.array([turn.prompt_tokens for turn in turns])
    outputs = np.array([turn.output_tokens for turn in turns])
    reused, first_share = _reuse(sessions)
    if session_rate is None:
        session_rate = len(sessions) / max(sessions[-1].start - sessions[0].start, 1e-3)
    own = OWN_PROFILE.get(name) or _profile(prompts, outputs, reused / max(1, int(prompts.sum())), first_share)
    return Demand(
        name, tuple(sessions), len(turns), float(prompts.mean()), reused / len(turns), float(outputs.mean()),
        int((prompts + outputs).max()), int(np.median(prompts + outputs)),
        session_rate * len(turns) / len(sessions), session_rate, own,
    )  # fmt: skip


def _profile(prompts: np.ndarray, outputs: np.ndarray, hit_rate: float, first_share: float) -> str:
    """The shipped endpoint profile whose shape is nearest."""
    middle = float(np.median(prompts))
    if float(np.quantile(prompts, 0.9)) > _WIDE * middle:
        return "mixed"
    if float(np.median(outputs)) > max(_LONG_ANSWER, middle / 2):
        return "rollouts"
    if middle <= _SHORT:
        return "short-chat"
    return "coding-agents" if hit_rate > 0.5 and first_share > 0.5 else "long-agents"


@dataclass(slots=True)
class _Node:
    """What came after one beginning: by text, the most tokens of it, and what followed."""

    tokens: dict[int, int] = field(default_factory=dict)
    after: dict[tuple[int, int], _Node] = field(default_factory=dict)


def _reuse(sessions: Iterable[Session]) -> tuple[int, float]:
    """Prompt tokens that were said before, in all; and the share of them in sessions' first turns."""
    root, reused, first_reused, first_prompts = _Node(), 0, 0, 0
    for session in sessions:
        for number, turn in enumerate(session.turns):
            known = _known(root, turn)
            reused += known
            if number == 0:
                first_reused += known
                first_prompts += turn.prompt_tokens
    return reused, first_reused / max(1, first_prompts)


def _known(node: _Node, turn: Turn) -> int:
    """Tokens of a prompt's beginning that are there already; it and its answer are added."""
    known, whole = 0, True
    for text, tokens in (*turn.pieces, (turn.output, turn.output_tokens)):
        before = node.tokens.get(text, 0)
        if whole:
            known += min(before, tokens)
        whole = whole and before >= tokens
        node.tokens[text] = max(before, tokens)
        node = node.after.setdefault((text, tokens), _Node())
    return min(known, turn.prompt_tokens)
