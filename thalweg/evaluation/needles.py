"""Questions about facts hidden in real text, and what the right answers are. Seeded; exact in tokens.

A fact is a line `The value of KEY is: "VALUE".`; the question is `What is the value of KEY?`. Keys and values are two
common words each, so that they occur all over the text. One key in eight is never trained on by the embedded model;
only those are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from thalweg.errors import ConfigError
from thalweg.evaluation.haystack import ENTRY, Haystack, Line, Text
from thalweg.prose.facts import FIRST_WORDS, HELD_OUT_SHARE, WORDS, held_out, needle_line, question_for
from thalweg.text.chat import ChatOptions, encode_chat
from thalweg.text.tokenizer import Tokenizer

_WINDOW, _UNIT, _CHUNK = 128, 128, 2048
_VALUES, _HOPS, _COPIED = 4, 2, 8  # values of one key; steps of a chain; words of a note
_MOST_PER_DOCUMENT = 64
_TRIES = 1000


class Task(StrEnum):
    """What is asked."""

    SINGLE = "single"  # keys that share no word
    MULTI_KEY = "multi-key"  # keys that share their words with other keys
    MULTI_VALUE = "multi-value"  # all of a key's values
    KEYS_ONLY = "keys-only"  # the whole document is facts
    CHAIN = "chain"  # the value of a key is the value of another key
    COPY = "copy"  # a line of words, word by word


class Placing(StrEnum):
    """Where the facts that are asked for lie."""

    EVEN = "even"  # spread over all depths, all remainders modulo 4 equally often
    EDGES = "edges"  # first and last in the document, and across the edges of the window, of units and of chunks


@dataclass(frozen=True, slots=True)
class Spec:
    """`context` counts prompt and answer: the prompt has context - answer_tokens tokens."""

    task: Task
    context: int
    answer_tokens: int
    placing: Placing = Placing.EVEN
    distractors: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """`expected`: texts that must all be in the answer. `at`: prompt position of the last line needed for it."""

    text: str
    expected: tuple[str, ...]
    at: int
    place: str


@dataclass(frozen=True, slots=True)
class Exam:
    """One document and questions about it; the message is the document, a blank line and the question."""

    document: str
    questions: tuple[Question, ...]

    def message(self, question: Question) -> str:
        return f"{self.document}\n\n{question.text}"


@dataclass(frozen=True, slots=True)
class _Fact:
    """Lines to hide, the question about them, and the answer."""

    lines: tuple[str, ...]
    question: str
    expected: tuple[str, ...]


class Examiner:
    """Makes documents with questions for one tokenizer and one body of text."""

    def __init__(self, tokenizer: Tokenizer, text: Text) -> None:
        self._tokenizer, self._text = tokenizer, text
        empty = encode_chat([{"role": "user", "content": "data"}], tokenizer, ChatOptions(thinking=False)).token_ids
        self._head = empty.index(tokenizer.encode_text("data")[0])
        self._overhead = len(empty) - 1

    def per_document(self, spec: Spec) -> int:
        """Questions that share a document: their facts fill at most a quarter of it and half of its edges, and all
        remainders modulo 4 are asked for equally often."""
        tokens = len(self._tokenizer.encode_text(needle_line("data data", "data data")))
        lines = {Task.MULTI_VALUE: _VALUES, Task.CHAIN: 1 + _HOPS}.get(spec.task, 1)
        room = max(4 * tokens * lines, 2 * _UNIT if spec.placing is Placing.EDGES else 0)
        most = min(_MOST_PER_DOCUMENT, max(1, spec.context // room))
        return most - most % ENTRY if most > ENTRY else most

    def exam(self, spec: Spec, seed: tuple[int, ...], count: int) -> Exam:
        """`count` questions on one document. Raises ConfigError where they do not fit into the context."""
        random = np.random.default_rng(seed)
        facts = _FACTS[spec.task](random, count)
        asking = [len(self._tokenizer.encode_text(f"\n\n{fact.question}")) for fact in facts]
        prompt = spec.context - spec.answer_tokens
        tokens = prompt - self._overhead - max(asking)
        if tokens < 1:
            raise ConfigError(f"--context {spec.context} is too short for a question", param="context")
        others = self._others(random, spec, facts, tokens)
        hidden = [line for fact in facts for line in fact.lines]
        if spec.placing is Placing.EDGES:
            if others or len(hidden) > len(facts):
                raise ConfigError("--place edges is for one line per question and no distractors", param="place")
            lines, places = self._edges(random, hidden, tokens, prompt)
        else:
            lines, places = self._spread(random, hidden + others, tokens, packed=spec.task is Task.KEYS_ONLY), []
        haystack = Haystack(self._tokenizer, self._text, self._head)
        document, at = haystack.build(random, tokens, lines)
        questions = []
        end = 0
        for number, fact in enumerate(facts):
            end += len(fact.lines)
            place = places[number] if places else "even"
            questions.append(Question(fact.question, fact.expected, at[end - 1], place))
        return Exam(document, tuple(questions))

    def _others(self, random: np.random.Generator, spec: Spec, facts: list[_Fact], tokens: int) -> list[str]:
        """Lines that nobody asks for."""
        taken = {fact.question for fact in facts}
        count = spec.distractors
        if spec.task is Task.KEYS_ONLY:
            length = len(self._tokenizer.encode_text(needle_line("data data", "data data")))
            count = (tokens - 1) // length - len(facts)
        keys = (k for k in _keys(random, count + len(facts), alike=True, kept=False) if question_for(k) not in taken)
        return [needle_line(key, _value(random)) for key, _ in zip(keys, range(count), strict=False)]

    def _spread(self, random: np.random.Generator, texts: list[str], tokens: int, *, packed: bool) -> list[Line]:
        """Evenly over the depth in random order; `packed` one after the other from the start."""
        order = random.permutation(len(texts))
        share = 1 if packed else tokens / len(texts)
        lines = []
        for which, text in enumerate(texts):
            at = self._head + int((order[which] + (0 if packed else random.random())) * share)
            lines.append(Line(text, at if packed else at - at % ENTRY + which % ENTRY, exact=packed))
        return lines

    def _edges(
        self, random: np.random.Generator, texts: list[str], tokens: int, prompt: int
    ) -> tuple[list[Line], list[str]]:
        """First, last, across the window's edge, then across edges of units and chunks, every split of a line."""
        lengths = [len(ids) for ids in self._tokenizer.encode_texts(texts)]
        room = max(lengths)
        lines: list[Line] = []
        names: list[str] = []
        for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            split = 1 + number % (length - 1)
            fixed = {0: ("first", self._head), 1: ("last", self._head + tokens - length - 1)}
            fixed[2] = ("window", prompt - _WINDOW - split)
            for attempt in range(_TRIES):
                chunks = number % 2 == 0 and prompt > _CHUNK and attempt < _TRIES // 2  # their edges may be taken
                name, step = ("chunk", _CHUNK) if chunks else ("unit", _UNIT)
                edge = step * int(random.integers(1, max(2, (tokens + self._head) // step + 1)))
                name, at = fixed.get(number, (name, edge - split))
                free = all(abs(at - line.at) >= room + ENTRY for line in lines)
                if free and self._head <= at <= self._head + tokens - length - 1 and at != self._head + 1:
                    break
            else:
                raise ConfigError(f"{len(texts)} edges do not fit into {prompt} tokens; ask fewer", param="questions")
            lines.append(Line(text, at, exact=True))
            names.append(name)
        return lines, names


def _keys(random: np.random.Generator, count: int, *, alike: bool, kept: bool = True) -> list[str]:
    """Different keys. `alike`: words shared with other keys; else no word twice, as long as the words last.

    `kept`: only keys that the embedded model was not trained on.
    """
    size = len(WORDS)
    share = HELD_OUT_SHARE if kept else 1
    if alike:
        size = min(size, int((count * share) ** 0.5) + 4)
    pool = random.choice(len(WORDS), size, replace=False)
    first, second = (pool[axis].ravel() for axis in np.divmod(np.arange(size * size), size))
    if kept:
        first, second = (side[held_out(first, second)] for side in (first, second))
    if count > len(first):
        raise ConfigError(f"{count} different keys are wanted; there are {len(first)}", param="distractors")
    order = random.permutation(len(first))
    if not alike:
        used: set[tuple[int, int]] = set()
        order = np.array(sorted(order, key=lambda i: _again(used, int(first[i]), int(second[i]))))
    return [f"{WORDS[first[i]]} {WORDS[second[i]]}" for i in order[:count]]


def _again(used: set[tuple[int, int]], first: int, second: int) -> bool:
    """Whether a word is already used in its place; else both are used from now on."""
    if {(0, first), (1, second)} & used:
        return True
    used |= {(0, first), (1, second)}
    return False


def _value(random: np.random.Generator) -> str:
    return f"{FIRST_WORDS[random.integers(len(FIRST_WORDS))]} {WORDS[random.integers(len(WORDS))]}"


def _single(random: np.random.Generator, count: int, *, alike: bool = False) -> list[_Fact]:
    keys = _keys(random, count, alike=alike)
    values = [_value(random) for _ in keys]
    return [_Fact((needle_line(k, v),), question_for(k), (v,)) for k, v in zip(keys, values, strict=True)]


def _multi_key(random: np.random.Generator, count: int) -> list[_Fact]:
    return _single(random, count, alike=True)


def _multi_value(random: np.random.Generator, count: int) -> list[_Fact]:
    facts = []
    for key in _keys(random, count, alike=False):
        values = tuple(_value(random) for _ in range(_VALUES))
        lines = tuple(needle_line(key, value) for value in values)
        facts.append(_Fact(lines, f"What are the {_VALUES} values of {key}?", values))
    return facts


def _chain(random: np.random.Generator, count: int) -> list[_Fact]:
    facts = []
    keys = iter(_keys(random, count * (1 + _HOPS), alike=False))
    for _ in range(count):
        key, value = next(keys), _value(random)
        lines = [needle_line(key, value)]
        for _ in range(_HOPS):
            following = next(keys)
            lines.append(f"The value of {following} is the value of {key}.\n")
            key = following
        facts.append(_Fact(tuple(lines), question_for(key), (value,)))
    return facts


def _copy(random: np.random.Generator, count: int) -> list[_Fact]:
    facts = []
    for key in _keys(random, count, alike=False):
        note = " ".join(_value(random) for _ in range(_COPIED // 2))
        facts.append(_Fact((f'The note {key} is: "{note}".\n',), f"What is the note {key}?", (note,)))
    return facts


_FACTS: Mapping[Task, Callable[[np.random.Generator, int], list[_Fact]]] = MappingProxyType(
    {
        Task.SINGLE: _single,
        Task.MULTI_KEY: _multi_key,
        Task.MULTI_VALUE: _multi_value,
        Task.KEYS_ONLY: _multi_key,
        Task.CHAIN: _chain,
        Task.COPY: _copy,
    }
)
