"""The same weights and tokens in transformers and here: `python -m benchmarks.transformers_race OUT.jsonl`.

transformers reads the prompt in chunks of 512 tokens (one pass over all of it runs out of 16 GiB at 16K), then both
decode greedily. One JSON line per length, with the CPU seconds and wall seconds of each, and whether the greedy tokens
agree.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM, DynamicCache

from benchmarks.commit import commit_name
from benchmarks.depth import OUTPUT_TOKENS, Listener
from benchmarks.models import make_model
from thalweg.cli.demo import machine_facts
from thalweg.config.options import load_options
from thalweg.engine.runtime import build_runtime
from thalweg.types import GenerateRequest, SamplingParams

CHUNK = 512


def theirs(oracle: DeepseekV4ForCausalLM, prompt: np.ndarray, output_tokens: int) -> dict[str, Any]:
    tokens = torch.from_numpy(prompt.astype(np.int64))[None]
    cache = DynamicCache(config=oracle.config)
    begin, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for start in range(0, tokens.shape[1], CHUNK):
            chunk = tokens[:, start : start + CHUNK]
            logits = oracle(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        facts: dict[str, Any] = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        output, steps = [int(logits[0, -1].argmax())], []
        while len(output) < output_tokens:
            begin = time.perf_counter()
            logits = oracle(torch.tensor([[output[-1]]]), past_key_values=cache, use_cache=True).logits
            output.append(int(logits[0, -1].argmax()))
            steps.append(time.perf_counter() - begin)
    return facts | {"decode_seconds": median(steps), "output": output}


def ours(model: str, prompt: np.ndarray, flags: dict[str, Any]) -> dict[str, Any]:
    runtime = build_runtime(load_options({"model": model, "kv_cache_memory": "1GiB", **flags}, environment={}))
    runtime.engine.start()
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS)
    output: list[int] = []
    results = []
    for name, tokens in (("warm up", prompt[:1500][::-1].copy()), ("race", prompt)):
        listener, output = Listener(), []

        def listen(event: Any, listener: Listener = listener, output: list[int] = output) -> None:
            output += [t.token for t in getattr(event, "tokens", ())]
            listener(event)

        cpu = time.process_time()
        runtime.engine.submit(GenerateRequest(name, tokens, sampling), listen)
        listener.done.wait()
        spent, decode = time.process_time() - cpu, float(median(np.diff(listener.tokens)))
        share = listener.tokens[0] / listener.tokens[-1]  # the two phases use the cores alike
        results.append({"seconds": listener.tokens[0], "cpu_seconds": spent * share, "decode_seconds": decode})
    runtime.engine.close()
    return results[-1] | {"output": output}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", default="2048,8192,32768,65536")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, options.out.open("a") as file:
        model = make_model("small", Path(folder))
        oracle = DeepseekV4ForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        parameters = sum(p.numel() for p in oracle.parameters())
        for length in map(int, options.lengths.split(",")):
            prompt = np.random.default_rng(length).integers(3, oracle.config.vocab_size, length, np.int32)
            we = ours(model, prompt, {"threads": options.threads})
            they = theirs(oracle, prompt, OUTPUT_TOKENS)
            gc.collect()
            same = sum(a == b for a, b in zip(we.pop("output"), they.pop("output"), strict=True))
            facts = {
                "context_tokens": length,
                "parameters": parameters,
                "threads": options.threads,
                "thalweg": we,
                "transformers": they,
                "prefill_ratio": they["seconds"] / we["seconds"],
                "prefill_cpu_ratio": they["cpu_seconds"] / we["cpu_seconds"],
                "decode_ratio": they["decode_seconds"] / we["decode_seconds"],
                "same_tokens": same,
                "commit": commit_name(),
            }
            facts |= {"versions": machine_facts()}
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
