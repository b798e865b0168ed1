"""Training batches: needles in real text, and conversations that ask for them, in exact tokens.

A needle is a line `The value of KEY is: "VALUE".`; the question is `What is the value of KEY?` in V4's chat format, and
the answer is VALUE. Keys and values are two words of one token each. Between key and value there are three tokens in
the needle (` is`, `:`, ` "`) and three in the conversation (`?`, `<｜Assistant｜>`, `</think>`), so that the same heads
find the key in both by looking back. One key in eight is never trained on: `thalweg eval` asks for those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thalweg.evaluation.haystack import Text
from thalweg.prose.facts import FIRST_WORDS, HELD_OUT_SHARE, WORDS, held_out
from thalweg.text.markers import ASSISTANT, BOS, END_THINK, EOS, USER
from thalweg.text.tokenizer import Tokenizer

FARTHEST = 1 << 20
CUT = 32  # position skips happen at multiples of this
ANSWER_ROWS = 3  # two tokens and the end of sentence


@dataclass(frozen=True, slots=True)
class Needle:
    """Ids of key and value, two each."""

    key: tuple[int, int]
    value: tuple[int, int]


class Forms:
    """The fixed tokens of needles and questions under one tokenizer, and the words that fill them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        encode = tokenizer.encode_text
        self.inner = np.array([_one_token(tokenizer, f" {word}") for word in WORDS])
        self.first = np.array([_one_token(tokenizer, word) for word in FIRST_WORDS])
        self.bos, self.eos = tokenizer.special_id(BOS), tokenizer.special_id(EOS)
        self.user = tokenizer.special_id(USER)
        self.answer = (tokenizer.special_id(ASSISTANT), tokenizer.special_id(END_THINK))
        self.before, self.between, self.after = encode("The value of"), encode(' is: "'), encode('".\n')
        self.ask, self.blank, self.mark = encode("What is the value of"), encode("\n\n"), encode("?")

    def needle(self, needle: Needle) -> list[int]:
        return [*self.before, *needle.key, *self.between, *needle.value, *self.after]

    def question(self, needle: Needle) -> list[int]:
        """The question and the head of the answer; the next token is the value's first."""
        return [*self.ask, *needle.key, *self.mark, *self.answer]

    @property
    def needle_tokens(self) -> int:
        return len(self.before) + len(self.between) + len(self.after) + 4

    @property
    def question_tokens(self) -> int:
        return len(self.ask) + len(self.mark) + len(self.answer) + 2

    @property
    def turn_tokens(self) -> int:
        """Question, answer, end of sentence and the user mark (or the blank line) before it."""
        return self.question_tokens + 4

    def draw(self, random: np.random.Generator, count: int, *, alike: bool) -> list[Needle]:
        """Needles with different keys; `alike` takes the keys' words from a small set, so that each is in several."""
        share = 1 - 1 / HELD_OUT_SHARE
        size = min(len(WORDS), int((count / share) ** 0.5) + 4) if alike else len(WORDS)
        pool = np.sort(random.choice(len(WORDS), size, replace=False))
        first, second = (pool[axis].ravel() for axis in np.divmod(np.arange(size * size), size))
        fitting = np.flatnonzero(~held_out(first, second))
        chosen = random.choice(fitting, count, replace=False)
        values = random.integers(0, (len(FIRST_WORDS), len(WORDS)), (count, 2))
        keys = np.stack([self.inner[first[chosen]], self.inner[second[chosen]]], 1).tolist()
        answers = np.stack([self.first[values[:, 0]], self.inner[values[:, 1]]], 1).tolist()
        return [Needle((k[0], k[1]), (v[0], v[1])) for k, v in zip(keys, answers, strict=True)]


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode_text(text)
    assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
    return ids[0]


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of training batch. `skip`: the share of sequences with position skips."""

    sequences: int
    length: int
    needles: int
    questions: int
    text_rows: int
    skip: float = 0.0
    alike: float = 0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """ids and positions [B, L]; rows [B, Q] with targets: first those of the answers, then those of plain text."""

    ids: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    answer_rows: int


def training_batch(forms: Forms, text: Text, random: np.random.Generator, shape: Shape) -> Batch:
    """Documents with needles, each followed by a conversation that asks for some of them in another order."""
    parts = [_sequence(forms, text, random, shape) for _ in range(shape.sequences)]
    ids, positions, rows = (np.stack(p) for p in zip(*parts, strict=True))
    targets = np.take_along_axis(ids, rows + 1, 1)
    return Batch(ids, positions, rows, targets, ANSWER_ROWS * shape.questions)


def _sequence(
    forms: Forms, text: Text, random: np.random.Generator, shape: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    needles = forms.draw(random, shape.needles, alike=random.random() < shape.alike)
    document_tokens = shape.length - shape.questions * forms.turn_tokens
    filler_tokens = document_tokens - 2 - shape.needles * forms.needle_tokens
    assert filler_tokens >= 0, "needles and questions leave no room for text"
    filler, starts = _filler(text, random, filler_tokens)
    places = _places(random, starts, filler_tokens, shape.needles)
    ids = [forms.bos, forms.user]
    fixed = np.zeros(shape.length, bool)
    done = 0
    for place, needle in zip(places, needles, strict=True):
        ids += filler[done:place].tolist()
        fixed[len(ids) : len(ids) + forms.needle_tokens] = True
        ids += forms.needle(needle)
        done = place
    ids += filler[done:].tolist()
    text_end = len(ids)
    answers: list[int] = []
    for turn, which in enumerate(random.permutation(shape.needles)[: shape.questions]):
        ids += [*(forms.blank if turn == 0 else [forms.user]), *forms.question(needles[which])]
        answers += range(len(ids) - 1, len(ids) - 1 + ANSWER_ROWS)
        ids += [*needles[which].value, forms.eos]
    fixed[text_end:] = True
    plain = random.choice(np.arange(2, text_end - 1), shape.text_rows, replace=False)
    skip = _skips(random, fixed, shape)
    return np.array(ids), np.arange(shape.length) + skip, np.concatenate([np.array(answers), np.sort(plain)])


def _filler(text: Text, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A stretch of text from a line's start on, and its line starts."""
    last = np.searchsorted(text.line_starts, len(text) - count)
    begin = int(text.line_starts[random.integers(0, last)])
    lo, hi = np.searchsorted(text.line_starts, (begin, begin + count))
    return text.ids[begin : begin + count], text.line_starts[lo:hi] - begin


def _places(random: np.random.Generator, starts: np.ndarray, count: int, wanted: int) -> list[int]:
    """Where needles go: line starts, and anywhere when there are too few of them."""
    spare = random.integers(0, count + 1, max(0, wanted - len(starts)))
    chosen = random.choice(starts, min(wanted, len(starts)), replace=False) if len(starts) else starts
    return sorted(int(p) for p in np.concatenate([chosen, spare]))


def _skips(random: np.random.Generator, fixed: np.ndarray, shape: Shape) -> np.ndarray:
    """What to add to the positions: a few jumps, up to a million in all (arXiv 2309.10400), half of them uniform."""
    skip = np.zeros(shape.length, np.int64)
    cuts = np.flatnonzero(~(fixed[CUT::CUT] & fixed[CUT - 1 : -1 : CUT])) * CUT + CUT
    if random.random() >= shape.skip or not len(cuts):
        return skip
    far = FARTHEST - shape.length
    total = int(random.integers(0, far)) if random.random() < 0.5 else int(2 ** random.uniform(7, np.log2(far)))
    chosen = random.choice(cuts, min(len(cuts), int(random.integers(1, 4))), replace=False)
    for cut, jump in zip(chosen, random.multinomial(total // 128, np.ones(len(chosen)) / len(chosen)), strict=True):
        skip[cut:] += jump * 128
    return skip
