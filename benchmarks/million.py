"""A million tokens through the real server: `python benchmarks/million.py OUT.jsonl [--runs N] [--context N]`.

Each run starts a server on the embedded model, asks a document of exactly that length for facts that are spread from
its first to its last chunk, the first question cold and the others from the warm cache, and then a short prompt's worth
of output beside it. One JSON line per run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from thalweg.cli.demo import machine_facts, running_server
from thalweg.config.model_parse import default_model
from thalweg.evaluation.exam import Asking, ask, model_name
from thalweg.evaluation.haystack import library_text
from thalweg.evaluation.needles import Exam, Examiner, Placing, Spec, Task
from thalweg.text.tokenizer import Tokenizer

ANSWER_TOKENS = 8


def peak_rss_bytes(process: int) -> int:
    """The largest resident size that a process ever had."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None, "this kernel does not say"
    return int(found.group(1)) * 1024


def run(exam: Exam, flags: tuple[str, ...]) -> dict[str, Any]:
    with running_server("default", *flags) as (client, process):
        asking = Asking(model_name(client), ANSWER_TOKENS)
        before = peak_rss_bytes(process.pid)
        cold, *warm = [ask(client, asking, exam.message(question)) for question in exam.questions]
        peak = peak_rss_bytes(process.pid)
    right = [a.text.strip() in q.expected for a, q in zip((cold, *warm), exam.questions, strict=True)]
    return {
        "context_tokens": cold.prompt_tokens + ANSWER_TOKENS,
        "prefill_seconds": cold.first_token_seconds,
        "prefill_tokens_per_second": cold.prompt_tokens / cold.first_token_seconds,
        "warm_ttft_seconds": median(a.first_token_seconds for a in warm),
        "warm_cached_tokens": min(a.cached_tokens for a in warm),
        "decode_tokens_per_second": median(a.decode_tokens_per_second for a in (cold, *warm)),
        "peak_rss_bytes": peak,
        "rss_before_bytes": before,
        "needle_accuracy": sum(right) / len(right),
        "needles": [{"at": q.at, "right": ok} for q, ok in zip(exam.questions, right, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=1_048_576)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--flags", default="", help="more flags of thalweg serve")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(default_model())
    examiner = Examiner(tokenizer, library_text(tokenizer, options.context, 0))
    spec = Spec(Task.SINGLE, options.context, ANSWER_TOKENS, Placing.EVEN)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with options.out.open("a") as file:
        for number in range(options.runs):
            exam = examiner.exam(spec, (options.seed, number), options.questions)
            facts = {"run": number + 1, "commit": commit.stdout.strip(), "flags": options.flags}
            facts |= run(exam, tuple(options.flags.split())) | machine_facts()
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(json.dumps({k: v for k, v in facts.items() if k != "needles"}, indent=1))


if __name__ == "__main__":
    main()
