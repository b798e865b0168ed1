"""The embedded model makes rows matter: without those of a needle the answer is gone, without others it stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.engine.assembly import Shape, answer, engine_of
from thalweg.cache.geometry import cache_groups
from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import default_model, load_model_config, read_config_json
from thalweg.engine.batch import BatchBuilder
from thalweg.engine.engine import Engine
from thalweg.engine.runner import ModelRunner
from thalweg.engine.sampler import Sampler
from thalweg.evaluation.haystack import library_text
from thalweg.evaluation.needles import Exam, Examiner, Placing, Question, Spec, Task
from thalweg.kernels.registry import reference_kernels
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import plan_cache
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.numerics import Numerics
from thalweg.model.repeat import RepeatedModel
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate
from thalweg.text.chat import ChatOptions, encode_chat
from thalweg.text.tokenizer import Tokenizer

CONTEXT, ANSWER_TOKENS, NEEDLE_TOKENS = 4096, 8, 24
ENTRY = 4


class Lossy:
    """index_topk that never returns some entries."""

    def __init__(self) -> None:
        self.lost: set[int] = set()

    def __call__(self, *arguments: Tensor) -> Tensor:
        chosen = reference_kernels().index_topk(*arguments)
        gone = torch.isin(chosen, torch.tensor(sorted(self.lost), dtype=torch.int64))
        return chosen.masked_fill(gone, -1).sort(-1).values


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_model())


@pytest.fixture(scope="module")
def examiner(tokenizer: Tokenizer) -> Examiner:
    return Examiner(tokenizer, library_text(tokenizer, 100_000, 0))


def runner_of(config: ModelConfig, shape: Shape, lossy: Lossy, eos: int) -> tuple[ModelRunner, object]:
    groups = cache_groups(config)
    layout = CacheLayout(RowFormat.FLOAT32, RowFormat.FLOAT32, config.rope_dim)
    plan = plan_cache(groups, layout, budget_bytes=shape.cache_bytes, max_running=shape.max_running)
    device = torch.device("cpu")
    weights = allocate(config, torch.float32, device)
    load_parameters(open_checkpoint(default_model()), weights)
    model = Model(config, weights, Numerics(), dataclasses.replace(reference_kernels(), index_topk=lossy))
    arena = CacheArena(plan, device)
    return ModelRunner(RepeatedModel(model, arena, None), arena, BatchBuilder(config, groups), Sampler((eos,))), plan


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Iterator[tuple[Engine, Lossy]]:
    shape, lossy = Shape(max_running=2), Lossy()
    config = load_model_config(default_model())
    runner, plan = runner_of(config, shape, lossy, tokenizer.eos_id)
    made = engine_of(read_config_json(default_model()), runner, plan, shape)
    yield made, lossy
    made.close()


Ask = Callable[[Exam, Question, set[int]], str]


@pytest.fixture
def ask(engine: tuple[Engine, Lossy], tokenizer: Tokenizer) -> Ask:
    running, lossy = engine
    names = iter(range(10_000))

    def asked(exam: Exam, question: Question, lost: set[int]) -> str:
        message = {"role": "user", "content": exam.message(question)}
        prompt = encode_chat([message], tokenizer, ChatOptions(thinking=False)).token_ids
        lossy.lost = lost
        outcome = answer(running, f"{question.at} {next(names)}", prompt, max_tokens=ANSWER_TOKENS, ignore_eos=False)
        return tokenizer.decode(outcome.tokens, skip_special=True)

    return asked


@pytest.mark.parametrize("placing", list(Placing))
def test_a_needle_without_its_rows_is_not_found(examiner: Examiner, ask: Ask, placing: Placing) -> None:
    exam = examiner.exam(Spec(Task.SINGLE, CONTEXT, ANSWER_TOKENS, placing), (7,), 12)
    intact = blind = others = 0
    for question in exam.questions:
        own = set(range(question.at // ENTRY, (question.at + NEEDLE_TOKENS) // ENTRY + 1))
        elsewhere = {entry for entry in range(0, CONTEXT // ENTRY, 3) if entry not in own}
        intact += ask(exam, question, set()) == question.expected[0]
        blind += ask(exam, question, own) == question.expected[0]
        others += ask(exam, question, elsewhere) == question.expected[0]
    assert blind <= 1  # the last needle is inside the window
    assert intact == others == len(exam.questions)
