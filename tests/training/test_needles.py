"""Needles and documents have the exact tokens, lengths and alignments that they claim."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from thalweg.config.model_parse import default_model
from thalweg.evaluation.haystack import Text
from thalweg.evaluation.needles import Examiner, Spec, Task
from thalweg.prose.library import library_texts
from thalweg.text.tokenizer import Tokenizer
from training.needles import ANSWER_ROWS, CUT, FARTHEST, Batch, Forms, Shape, training_batch
from training.text import read_text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_model())


@pytest.fixture(scope="module")
def forms(tokenizer: Tokenizer) -> Forms:
    return Forms(tokenizer)


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> Text:
    """Enough of the library for these tests, encoded anew."""
    whole = read_text(tokenizer, most_files=40)
    assert len(whole) > 100_000
    return whole


def make(forms: Forms, text: Text, shape: Shape, seed: int = 0) -> Batch:
    return training_batch(forms, text, np.random.default_rng(seed), shape)


def test_the_last_part_of_the_text_is_held_out(tokenizer: Tokenizer, text: Text) -> None:
    whole = sum(len(ids) for ids in tokenizer.encode_texts(list(islice(library_texts(), 40))))
    assert len(text) == int(0.95 * whole)


def test_line_starts_are_where_a_line_can_be_put_in(tokenizer: Tokenizer, text: Text) -> None:
    """Text cut at a line start and encoded again gives the same ids: what a server gets is what was trained on."""
    random = np.random.default_rng(0)
    for at in random.choice(len(text.line_starts) - 20, 50):
        begin, middle, end = (int(text.line_starts[at + step]) for step in (0, 7, 15))
        line = [*tokenizer.encode_text('The value of file name is: "read only".\n')]
        ids = [*text.ids[begin:middle].tolist(), *line, *text.ids[middle:end].tolist()]
        assert tokenizer.encode_text(tokenizer.decode(ids)) == ids


def test_question_and_answer_are_the_chat_encoding(tokenizer: Tokenizer, forms: Forms) -> None:
    needle = forms.draw(np.random.default_rng(0), 1, alike=False)[0]
    key, value = tokenizer.decode(needle.key).strip(), tokenizer.decode(needle.value)
    assert tokenizer.decode(forms.needle(needle)) == f'The value of {key} is: "{value}".\n'
    assert tokenizer.encode_text(f'The value of {key} is: "{value}".\n') == forms.needle(needle)
    assert tokenizer.decode(forms.question(needle)) == f"What is the value of {key}?<｜Assistant｜></think>"
    assert len(forms.needle(needle)) == forms.needle_tokens
    assert len(forms.question(needle)) == forms.question_tokens


@pytest.mark.parametrize("alike", [False, True])
def test_keys_that_are_asked_for_are_never_trained_on(
    tokenizer: Tokenizer, forms: Forms, text: Text, alike: bool
) -> None:
    random = np.random.default_rng(1)
    trained = {n.key for _ in range(30) for n in forms.draw(random, 48, alike=alike)}
    assert len(trained) > 600
    spec = Spec(Task.MULTI_KEY if alike else Task.SINGLE, 4096, 16)
    asked = set()
    for seed in range(20):
        for question in Examiner(tokenizer, text).exam(spec, (seed,), 32).questions:
            key = question.text.removeprefix("What is the value of").removesuffix("?")
            asked.add(tuple(tokenizer.encode_text(key)))
    assert len(asked) > 300 and not asked & trained
    assert len({n.key for n in forms.draw(random, 48, alike=alike)}) == 48


def test_a_batch_has_the_length_and_every_answer_stands_in_its_document(forms: Forms, text: Text) -> None:
    shape = Shape(sequences=4, length=384, needles=8, questions=5, text_rows=16)
    batch = make(forms, text, shape)
    assert batch.ids.shape == batch.positions.shape == (4, 384)
    assert batch.answer_rows == 5 * ANSWER_ROWS
    for ids, rows, targets in zip(batch.ids, batch.rows, batch.targets, strict=True):
        assert (ids[rows + 1] == targets).all()
        for first, second, end in targets[: batch.answer_rows].reshape(-1, ANSWER_ROWS):
            said = [*forms.between, first, second, *forms.after]
            assert any(ids[at : at + len(said)].tolist() == said for at in range(300))
            assert end == forms.eos


def test_a_batch_is_reproducible(forms: Forms, text: Text) -> None:
    shape = Shape(2, 256, 4, 4, 8, skip=1.0)
    one, same, other = (make(forms, text, shape, seed) for seed in (3, 3, 4))
    assert (one.ids == same.ids).all() and (one.positions == same.positions).all()
    assert (one.ids != other.ids).any()


def test_positions_jump_only_forward_at_cuts_and_stay_below_a_million(forms: Forms, text: Text) -> None:
    positions = np.concatenate(
        [make(forms, text, Shape(16, 512, 4, 4, 8, skip=1.0), seed).positions for seed in (0, 1)]
    )
    steps = np.diff(positions, axis=1)
    jumped = np.argwhere(steps != 1)
    assert len(jumped) and (steps >= 1).all() and positions.max() < FARTHEST
    assert ((jumped[:, 1] + 1) % CUT == 0).all()
    assert (steps[steps != 1] % 128 == 1).all()
    assert positions.max() > FARTHEST // 2, "no distance near a million was drawn"
