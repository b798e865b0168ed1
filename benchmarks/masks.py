"""What holding an answer to a grammar costs: `python -m benchmarks.masks OUT.jsonl TOKENIZER_DIRECTORY…`.

One line per tokenizer and grammar. A known answer is spoken token by token through the sampler, greedily, with its
grammar and without; the samples are milliseconds of processor time per token of the sampling alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thalweg.cli.demo import machine_facts
from thalweg.engine.request import Sequence
from thalweg.engine.sampler import Sampler
from thalweg.text.chat import OutputStart
from thalweg.text.dsml_grammar import BlockStart, Function, calls_grammar
from thalweg.text.grammar import Grammar, GrammarCompiler, json_term
from thalweg.text.rules import ChatRules, RuleTokens
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import GenerateRequest, SamplingParams

_ROUNDS = 5
_TOOLS = 20
_TEXT = {"type": "string"}
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": _TEXT,
        "tags": {"type": "array", "items": _TEXT},
        "age": {"type": "integer"},
        "address": {
            "type": "object",
            "properties": {"street": _TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
    },
    "required": ["name", "tags", "age", "address"],
}
_VALUE = {
    "name": "Ada Lovelace of London, who wrote long notes",
    "tags": ["mathematics", "poetical science", "engines and so on"],
    "age": 36,
    "address": {"street": '12 St. James\'s Square, "top" floor', "zip": "12345"},
}
_CALL = (
    '<§invoke name="tool_0">\n<§parameter name="text" string="true">Raw text with <b> and "quotes",\n'
    "over lines, as a file would have them. def f(x): return x</§parameter>\n"
    '<§parameter name="count" string="false">36</§parameter>\n</§invoke>\n</§tool_calls>'
)


def main(out: Path, directories: list[Path]) -> None:
    """Measure with each tokenizer and append the lines."""
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    facts = {**machine_facts(), "commit": commit.strip()}
    with out.open("a", encoding="utf-8") as file:
        for directory in directories:
            for line in measured(Tokenizer.load(directory)):
                print(json.dumps({**line, "machine": facts}), file=file, flush=True)


def measured(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The lines of one tokenizer."""
    begin = time.perf_counter()
    compiler, tokens = GrammarCompiler(tokenizer), RuleTokens.of(tokenizer, (tokenizer.eos_id,))
    vocabulary_seconds = time.perf_counter() - begin
    properties = {"text": _TEXT, "count": {"type": "integer"}, "others": {"type": "array", "items": _TEXT}}
    schema = {"type": "object", "properties": properties, "required": ["text", "count"]}
    functions = [Function(f"tool_{number}", schema) for number in range(_TOOLS)]
    cases = {
        "json schema": (f"start: {json_term(_SCHEMA)}\n", json.dumps(_VALUE)),
        f"calls of {_TOOLS} tools": (calls_grammar(functions, tokens.mark, BlockStart.TAG, several=True), _CALL),
    }
    lines = []
    for name, (grammar, answer) in cases.items():
        begin = time.perf_counter()
        compiled = compiler.compile(grammar)
        compile_seconds = time.perf_counter() - begin
        ids: list[int] = []
        for place, part in enumerate(answer.split("§")):
            ids += ([tokens.mark] if place else []) + tokenizer.encode_text(part)
        free = samples(tokenizer, tokens, ids, None)
        held = samples(tokenizer, tokens, ids, compiled)
        lines.append({
            "vocabulary": tokenizer.vocab_size, "grammar": name, "answer_tokens": len(ids),
            "vocabulary_seconds": round(vocabulary_seconds, 4), "compile_seconds": round(compile_seconds, 5),
            "free_median_ms": round(float(np.median(free)), 4), "held_median_ms": round(float(np.median(held)), 4),
            "held_p99_ms": round(float(np.quantile(held, 0.99)), 4),
            "free_ms": [round(x, 4) for x in free], "held_ms": [round(x, 4) for x in held],
        })  # fmt: skip
    return lines


def samples(tokenizer: Tokenizer, tokens: RuleTokens, ids: list[int], grammar: Grammar | None) -> list[float]:
    """Milliseconds of processor time of each token in each round: other programs do not count."""
    taken = []
    sampler, random = Sampler((tokenizer.eos_id,)), torch.Generator().manual_seed(1)
    for _ in range(_ROUNDS):
        rules = None if grammar is None else ChatRules(tokens, OutputStart.CONTENT, grammar=grammar)
        request = GenerateRequest("r", np.array([4], np.int32), SamplingParams(temperature=0.0), rules=rules)
        sequence = Sequence(request, lambda event: None, len(ids), 0.0)
        for token in ids:
            logits = torch.randn(1, tokenizer.vocab_size, generator=random)
            logits[0, token] = 50
            begin = time.process_time()
            sampler.sample(logits, [sequence], [0])
            taken.append(1000 * (time.process_time() - begin))
            sequence.append(token)
    return taken


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
