"""Exams are exactly as long as they claim, and every fact lies where its question says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.text.conftest import official_directory
from thalweg.config.model_parse import default_model
from thalweg.errors import ConfigError
from thalweg.evaluation.haystack import Text, library_text
from thalweg.evaluation.needles import Exam, Examiner, Placing, Spec, Task
from thalweg.prose.facts import FIRST_WORDS, WORDS
from thalweg.text.chat import ChatOptions, encode_chat
from thalweg.text.tokenizer import Tokenizer

ANSWER = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_model())


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> Text:
    return library_text(tokenizer, 600_000, 0)


@pytest.fixture(scope="module")
def examiner(tokenizer: Tokenizer, text: Text) -> Examiner:
    return Examiner(tokenizer, text)


def prompts(exam: Exam, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """What the server makes of each question."""
    options = ChatOptions(thinking=False)
    return [
        encode_chat([{"role": "user", "content": exam.message(question)}], tokenizer, options).token_ids
        for question in exam.questions
    ]


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("context", [1024, 4096, 16384])
def test_every_task_at_every_length(examiner: Examiner, tokenizer: Tokenizer, task: Task, context: int) -> None:
    spec = Spec(task, context, ANSWER)
    for seed in range(3):
        exam = examiner.exam(spec, (seed,), min(12, examiner.per_document(spec)))
        found = prompts(exam, tokenizer)
        assert max(map(len, found)) == context - ANSWER
        assert min(map(len, found)) >= context - ANSWER - 2  # where questions differ in length
        for question, ids in zip(exam.questions, found, strict=True):
            line = tokenizer.decode(ids[question.at : question.at + 40]).split("\n")[0]
            assert line.startswith("The note" if task is Task.COPY else "The value of ")
            assert all(exam.document.count(f'"{value}".\n') >= 1 for value in question.expected)


def test_all_alignments_and_depths_are_asked_equally_often(examiner: Examiner) -> None:
    exam = examiner.exam(Spec(Task.SINGLE, 65536, ANSWER), (1,), 64)
    at = np.array([question.at for question in exam.questions])
    assert np.bincount(at % 4, minlength=4).tolist() == [16] * 4
    assert np.bincount(at * 8 // 65536, minlength=8).min() >= 6


@pytest.mark.parametrize("context", [700, 1024, 4096])
def test_short_documents_have_every_alignment_too(examiner: Examiner, context: int) -> None:
    for seed in range(20):
        exam = examiner.exam(Spec(Task.SINGLE, context, ANSWER), (seed,), 8)
        assert np.bincount([question.at % 4 for question in exam.questions], minlength=4).tolist() == [2] * 4


@pytest.mark.parametrize("context", [4096, 16384])
def test_edges_are_where_they_say(examiner: Examiner, tokenizer: Tokenizer, context: int) -> None:
    spec = Spec(Task.SINGLE, context, ANSWER, Placing.EDGES)
    exam = examiner.exam(spec, (2,), 16)
    prompt = context - ANSWER
    splits = set()
    for question, ids in zip(exam.questions, prompts(exam, tokenizer), strict=True):
        length = len(tokenizer.encode_text(f'{question.text[8:-1].capitalize()} is: "{question.expected[0]}".\n'))
        last = question.at + length - 1
        assert tokenizer.decode(ids[question.at : last + 1]).endswith(f'"{question.expected[0]}".\n')
        if question.place == "first":
            assert question.at == 2
        elif question.place == "last":
            assert tokenizer.decode(ids[last + 1 :]).startswith("data\n\nWhat is")
        elif question.place == "window":
            assert question.at < prompt - 128 <= last
        else:
            step = {"unit": 128, "chunk": 2048}[question.place]
            assert question.at // step < last // step
            splits.add(-question.at % step)
    assert {"first", "last", "window", "unit", "chunk"} == {question.place for question in exam.questions}
    assert len(splits) >= 8


def test_distractors_share_words_with_the_keys_and_are_not_asked_for(examiner: Examiner) -> None:
    exam = examiner.exam(Spec(Task.MULTI_KEY, 16384, ANSWER, distractors=160), (3,), 32)
    assert exam.document.count("The value of ") == 192
    for question in exam.questions:
        key = question.text.removeprefix("What is the value of ").removesuffix("?")
        assert exam.document.count(f"The value of {key} is:") == 1
        first, second = key.split()
        assert exam.document.count(f"The value of {first} ") > 1 or exam.document.count(f" {second} is:") > 1


def test_keys_only_is_nothing_else(examiner: Examiner) -> None:
    exam = examiner.exam(Spec(Task.KEYS_ONLY, 4096, ANSWER), (4,), 8)
    *facts, rest = exam.document.split("\n")
    assert all(line.startswith("The value of ") for line in facts)
    assert set(rest.split()) <= {"data"}


def test_the_same_seed_gives_the_same_exam(examiner: Examiner) -> None:
    spec = Spec(Task.CHAIN, 4096, ANSWER)
    assert examiner.exam(spec, (5, 0), 4) == examiner.exam(spec, (5, 0), 4)
    assert examiner.exam(spec, (5, 0), 4).document != examiner.exam(spec, (5, 1), 4).document


def test_lengths_are_exact_under_the_published_tokenizer() -> None:
    published = Tokenizer.load(official_directory())
    examiner = Examiner(published, library_text(published, 100_000, 0))
    for task in (Task.SINGLE, Task.COPY):
        exam = examiner.exam(Spec(task, 8192, ANSWER), (0,), 16)
        assert max(map(len, prompts(exam, published))) == 8192 - ANSWER


@pytest.mark.parametrize(
    ("spec", "count", "message"),
    [
        (Spec(Task.SINGLE, 20, ANSWER), 1, "too short"),
        (Spec(Task.SINGLE, 128, ANSWER), 60, "the lines need"),
        (Spec(Task.SINGLE, 900_000, ANSWER), 1, "tokens of text on this machine"),
        (Spec(Task.MULTI_KEY, 65536, ANSWER, distractors=20_000), 1, "different keys"),
        (Spec(Task.SINGLE, 1024, ANSWER, Placing.EDGES), 60, "edges do not fit"),
        (Spec(Task.CHAIN, 4096, ANSWER, Placing.EDGES), 2, "one line per question"),
    ],
)
def test_what_does_not_fit_is_said(examiner: Examiner, spec: Spec, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        examiner.exam(spec, (0,), count)


def test_the_words_are_single_tokens_of_the_embedded_tokenizer(tokenizer: Tokenizer) -> None:
    assert all(len(tokenizer.encode_text(f" {word}")) == 1 for word in WORDS)
    assert all(len(tokenizer.encode_text(f'"{word}')) == 2 for word in FIRST_WORDS)
    assert len(set(WORDS)) == len(WORDS) and set(FIRST_WORDS) <= set(WORDS)
