"""Asks an endpoint the questions of an exam, one after the other, and scores the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from thalweg.errors import UnavailableError
from thalweg.evaluation.endpoint import Client
from thalweg.evaluation.haystack import ENTRY
from thalweg.evaluation.needles import Exam, Question

Progress = Callable[[int, int], None]  # prompt tokens read so far, and all of them


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what it took, by this process's clock. Token counts are the endpoint's; 0 where it gives none."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_seconds: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Asking:
    """How to ask: of which model, for how long an answer, thinking or not; None leaves that to the endpoint."""

    model: str
    max_tokens: int
    thinking: bool | None = None

    def fields(self, message: str) -> dict[str, Any]:
        switch = {} if self.thinking is None else {"chat_template_kwargs": {"thinking": self.thinking}}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **switch,
        }


def ask(client: Client, how: Asking, message: str, progress: Progress = lambda done, total: None) -> Answer:
    """One user message, answered greedily and streamed. Raises UnavailableError with what the endpoint said."""
    begin = time.monotonic()
    first = last = 0.0
    text = ""
    usage: dict[str, Any] = {}
    for kind, line in client.events("/v1/chat/completions", how.fields(message)):
        if kind == "comment":
            if line.startswith("prefill "):
                done, total = line.removeprefix("prefill ").split("/")
                progress(int(done), int(total))
            continue
        chunk = _chunk(line)
        if "error" in chunk:
            raise UnavailableError(str(chunk["error"].get("message", chunk["error"])))
        usage = chunk.get("usage") or usage
        if chunk.get("choices"):
            last = time.monotonic()
            first = first or last
            text += chunk["choices"][0]["delta"].get("content") or ""
    completed = usage.get("completion_tokens", 0)
    speed = (completed - 1) / (last - first) if last > first and completed > 1 else float("nan")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(text, usage.get("prompt_tokens", 0), cached, completed, first - begin, speed)


def _chunk(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise UnavailableError(f"the endpoint streamed {line[:80]!r}, which is no JSON object") from error


def model_name(client: Client) -> str:
    """The first model that the endpoint lists."""
    try:
        return str(json.loads(client.get("/v1/models"))["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise UnavailableError(f"the endpoint lists no model: {error!r}") from error


def is_exact(question: Question, answer: str) -> bool:
    """The answer is the value and nothing else, but for spaces, quotation marks and a full stop."""
    return len(question.expected) == 1 and answer.strip().strip('."').strip() == question.expected[0]


def contains(question: Question, answer: str) -> bool:
    """All values are somewhere in the answer."""
    return all(value in answer for value in question.expected)


@dataclass(slots=True)
class Score:
    """Counts of [right, asked]; right means that all values are in the answer, exact that it is nothing else."""

    right: int = 0
    exact: int = 0
    asked: int = 0
    by_alignment: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(ENTRY)])
    by_place: dict[str, list[int]] = field(default_factory=dict)
    by_depth: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(8)])
    wrong: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: set[int] = field(default_factory=set)
    cached_tokens: int = 0
    first_seconds: list[float] = field(default_factory=list)  # of the first question of each document
    later_seconds: list[float] = field(default_factory=list)

    def add(self, question: Question, answer: Answer, *, first: bool) -> None:
        right = contains(question, answer.text)
        depth = question.at * 8 // max(answer.prompt_tokens, question.at + 1)
        place = self.by_place.setdefault(question.place, [0, 0])
        for count in (self.by_alignment[question.at % ENTRY], place, self.by_depth[depth]):
            count[0] += right
            count[1] += 1
        self.asked += 1
        self.right += right
        self.exact += is_exact(question, answer.text)
        self.prompt_tokens.add(answer.prompt_tokens)
        self.cached_tokens += answer.cached_tokens
        (self.first_seconds if first else self.later_seconds).append(answer.first_token_seconds)
        if not right:
            self.wrong.append(asdict(question) | {"answer": answer.text})

    def fields(self) -> dict[str, Any]:
        """Plain values. `accuracy` is right / questions."""
        return {
            "accuracy": self.right / self.asked,
            "questions": self.asked,
            "right": self.right,
            "exact": self.exact,
            "by_alignment": self.by_alignment,
            "by_place": self.by_place,
            "by_depth": self.by_depth,
            "documents": len(self.first_seconds),
            "prompt_tokens": sorted(self.prompt_tokens),
            "cached_tokens": self.cached_tokens,
            "first_ttft_seconds": [round(s, 3) for s in self.first_seconds],
            "later_ttft_seconds_median": round(median(self.later_seconds), 3) if self.later_seconds else None,
            "wrong": self.wrong,
        }


def run(client: Client, how: Asking, exams: Iterable[Exam], report: Callable[[int, Score], Progress]) -> Score:
    """All questions of all exams in order. `report` is told the number of the document and the score so far."""
    score = Score()
    for number, exam in enumerate(exams):
        for position, question in enumerate(exam.questions):
            progress = report(number, score)
            answer = ask(client, how, exam.message(question), progress)
            score.add(question, answer, first=position == 0)
    return score
