"""The embedded checkpoint is a true V4 file: `generate` of transformers finds the needles too."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.parameters import Precision, parameters
from thalweg.checkpoint.reader import CheckpointLayout, open_checkpoint
from thalweg.checkpoint.writer import WriteFormat, write_checkpoint
from thalweg.config.model_parse import default_model, load_model_config, read_config_json
from thalweg.evaluation.haystack import library_text
from thalweg.evaluation.needles import Examiner, Spec, Task
from thalweg.text.chat import ChatOptions, encode_chat
from thalweg.text.tokenizer import Tokenizer

ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_model())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> DeepseekV4ForCausalLM:
    """The shipped weights under transformers' tensor names, in fp32."""
    directory = tmp_path_factory.mktemp("oracle") / "model"
    wanted = parameters(load_model_config(default_model()))
    values = {
        p.name: torch.empty(p.shape, dtype=torch.int64 if p.precision is Precision.INT64 else torch.float32)
        for p in wanted
    }
    load_parameters(open_checkpoint(default_model()), values)
    fields = read_config_json(default_model()) | {"torch_dtype": "float32"}
    form = WriteFormat(layout=CheckpointLayout.TRANSFORMERS, plain=torch.float32)
    write_checkpoint(directory, fields, [(p, values[p.name]) for p in wanted], form)
    model = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("context", [1024, 4096])
def test_generate_answers(oracle: DeepseekV4ForCausalLM, tokenizer: Tokenizer, context: int) -> None:
    examiner = Examiner(tokenizer, library_text(tokenizer, 100_000, 0))
    exam = examiner.exam(Spec(Task.SINGLE, context, ANSWER_TOKENS), (context,), 8)
    right = 0
    for question in exam.questions:
        message = {"role": "user", "content": exam.message(question)}
        prompt = torch.tensor([encode_chat([message], tokenizer, ChatOptions(thinking=False)).token_ids])
        assert prompt.shape[1] == context - ANSWER_TOKENS
        with torch.no_grad():
            full = oracle.generate(prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_id)
        right += tokenizer.decode(full[0, prompt.shape[1] :].tolist(), skip_special=True) == question.expected[0]
    assert right == len(exam.questions)
