"""The public race: `python -m benchmarks.race OUT.jsonl [--runs N]`: one thread, CPU seconds, the 77 M-parameter model.

Each run is one process with one engine: cold prompts of 2K, 16K and 32K tokens with decoding after each, the 16K prompt
once more, a prompt that leaves it after 70%, and the memory of the process that held the 32K conversation. The best
figures of public engines on this job, which were measured elsewhere, stand beside them as `best_public`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.commit import commit_name
from benchmarks.depth import OUTPUT_TOKENS, Listener
from benchmarks.million import peak_rss_bytes
from benchmarks.models import make_model
from thalweg.cli.demo import machine_facts
from thalweg.config.options import load_options
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.types import GenerateRequest, SamplingParams

LENGTHS = (2048, 16384, 32768)
BEST_PUBLIC = {
    "prefill_tokens_per_cpu_second": {"2048": 820, "16384": 400, "32768": 356},
    "decode_tokens_per_cpu_second": {"2048": 150, "16384": 100, "32768": 82},
    "again_cpu_seconds": 0.05,
    "branch_cpu_seconds": 4.7,
    "peak_rss_bytes": 0.4e9,
}


def asked(runtime: Runtime, name: str, prompt: np.ndarray, output_tokens: int) -> tuple[float, float]:
    """CPU seconds until the first token, and of each token after it."""
    listener, marks = Listener(), []

    def listen(event: Any) -> None:
        if getattr(event, "tokens", ()):
            marks.append(time.process_time())
        listener(event)

    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, min_tokens=output_tokens)
    begin = time.process_time()
    runtime.engine.submit(GenerateRequest(name, prompt, sampling), listen)
    listener.done.wait()
    return marks[0] - begin, float(median(np.diff(marks))) if len(marks) > 1 else 0.0


def race(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    runtime = build_runtime(load_options({"model": model, **flags}, environment={}))
    runtime.engine.start()
    random = np.random.default_rng(1)
    prompts = {n: random.integers(3, 4096, n, np.int32) for n in LENGTHS}
    asked(runtime, "warm up", random.integers(3, 4096, 1500, np.int32), 4)
    prefill, decode = {}, {}
    for length, prompt in prompts.items():
        cold, step = asked(runtime, f"cold {length}", prompt, OUTPUT_TOKENS)
        prefill[str(length)], decode[str(length)] = length / cold, 1 / step
    again, _ = asked(runtime, "again", prompts[16384], 1)
    branched = prompts[16384].copy()
    branched[int(0.7 * len(branched)) :] = random.integers(3, 4096, len(branched) - int(0.7 * len(branched)), np.int32)
    branch, _ = asked(runtime, "branch", branched, 1)
    runtime.engine.close()
    return {
        "prefill_tokens_per_cpu_second": prefill,
        "decode_tokens_per_cpu_second": decode,
        "again_cpu_seconds": again,
        "branch_cpu_seconds": branch,
        "peak_rss_bytes": peak_rss_bytes(os.getpid()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kv-cache-memory", default="384MiB")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--kv-cache-dtype", default="bfloat16", help="16 bits, as the other engines keep their rows")
    parser.add_argument("--model", default=None, help="the directory of the model, made before; for one run inside")
    options = parser.parse_args()
    flags = {
        "threads": 1,
        "kv_cache_memory": options.kv_cache_memory,
        "kv_cache_dtype": options.kv_cache_dtype,
        "kernels": options.kernels,
        "max_num_seqs": 1,
    }
    if options.model is not None:
        facts = {"commit": commit_name(), **flags, **race(options.model, flags), "best_public": BEST_PUBLIC}
        with options.out.open("a") as file:
            file.write(json.dumps(facts | machine_facts()) + "\n")
        print(json.dumps(facts, indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("race", Path(folder))
        for _ in range(options.runs):  # a process each: memory counts too
            command = [sys.executable, "-m", "benchmarks.race", *sys.argv[1:], "--model", model]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
