"""The embedded model under transformers' `generate`: `python benchmarks/needles_transformers.py OUT.jsonl`.

The same documents and questions as `thalweg eval needle` asks, at lengths that transformers manages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import DeepseekV4ForCausalLM

from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.parameters import Precision, parameters
from thalweg.checkpoint.reader import CheckpointLayout, open_checkpoint
from thalweg.checkpoint.writer import WriteFormat, write_checkpoint
from thalweg.cli.demo import machine_facts
from thalweg.config.model_parse import default_model, load_model_config, read_config_json
from thalweg.evaluation.haystack import library_text
from thalweg.evaluation.needles import Exam, Examiner, Spec, Task
from thalweg.text.chat import ChatOptions, encode_chat
from thalweg.text.tokenizer import Tokenizer

ANSWER_TOKENS = 8


def load_oracle(folder: Path) -> DeepseekV4ForCausalLM:
    """The shipped weights under transformers' tensor names, in fp32, by way of files in a folder."""
    wanted = parameters(load_model_config(default_model()))
    values = {
        p.name: torch.empty(p.shape, dtype=torch.int64 if p.precision is Precision.INT64 else torch.float32)
        for p in wanted
    }
    load_parameters(open_checkpoint(default_model()), values)
    fields = read_config_json(default_model()) | {"torch_dtype": "float32"}
    form = WriteFormat(layout=CheckpointLayout.TRANSFORMERS, plain=torch.float32)
    write_checkpoint(folder / "model", fields, [(p, values[p.name]) for p in wanted], form)
    model = DeepseekV4ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def right_answers(oracle: DeepseekV4ForCausalLM, tokenizer: Tokenizer, exam: Exam, context: int) -> int:
    """How many questions of an exam are answered exactly."""
    right = 0
    for question in exam.questions:
        message = {"role": "user", "content": exam.message(question)}
        prompt = torch.tensor([encode_chat([message], tokenizer, ChatOptions(thinking=False)).token_ids])
        assert prompt.shape[1] == context - ANSWER_TOKENS, "a prompt of another length"
        with torch.no_grad():
            full = oracle.generate(prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_id)
        right += tokenizer.decode(full[0, prompt.shape[1] :].tolist(), skip_special=True) == question.expected[0]
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=128)
    options = parser.parse_args()
    tokenizer = Tokenizer.load(default_model())
    examiner = Examiner(tokenizer, library_text(tokenizer, 100_000, 0))
    with tempfile.TemporaryDirectory() as folder, options.out.open("a") as file:
        oracle = load_oracle(Path(folder))
        for context in (1024, 4096):
            spec, asked, right = Spec(Task.SINGLE, context, ANSWER_TOKENS), 0, 0
            while asked < options.questions:
                exam = examiner.exam(spec, (context, asked), min(8, options.questions - asked))
                right += right_answers(oracle, tokenizer, exam, context)
                asked += len(exam.questions)
            facts = {"cell": f"transformers generate {context}", "context": context, "right": right, "questions": asked}
            file.write(json.dumps(facts | machine_facts()) + "\n")
            print(f"{facts['cell']}: {right}/{asked}")


if __name__ == "__main__":
    main()
