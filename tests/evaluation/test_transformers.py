"""The embedded checkpoint is a true V4 file: `generate` of transformers finds the needles too."""

from __future__ import annotations

import pytest
from transformers import DeepseekV4ForCausalLM

from benchmarks.needles_transformers import ANSWER_TOKENS, load_oracle, right_answers
from thalweg.config.model_parse import default_model
from thalweg.evaluation.haystack import library_text
from thalweg.evaluation.needles import Examiner, Spec, Task
from thalweg.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> DeepseekV4ForCausalLM:
    return load_oracle(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("context", [1024, 4096])
def test_generate_answers(oracle: DeepseekV4ForCausalLM, context: int) -> None:
    tokenizer = Tokenizer.load(default_model())
    examiner = Examiner(tokenizer, library_text(tokenizer, 100_000, 0))
    questions = 8 if context == 1024 else 4  # seconds each
    exam = examiner.exam(Spec(Task.SINGLE, context, ANSWER_TOKENS), (context,), questions)
    assert right_answers(oracle, tokenizer, exam, context) == len(exam.questions)
