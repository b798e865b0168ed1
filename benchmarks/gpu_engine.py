"""The engine on the GPU at hand, whole: `python -m benchmarks.gpu_engine OUT.json [--model DIRECTORY]`.

What no CPU can show: that captured graphs give the bits of steps computed kernel by kernel, that no step waits for the
device before its tokens are read, that after the warm-up nothing is compiled, that memory stays within what start-up
said, and what graphs are worth. Fails where one of the first four does not hold.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.commit import commit_name
from thalweg.config.options import load_options
from thalweg.engine.request import Sequence
from thalweg.engine.runner import Steps
from thalweg.engine.runtime import Runtime, build_runtime
from thalweg.engine.sampler import Sampler
from thalweg.errors import ThalwegError
from thalweg.model.graphs import GraphedModel
from thalweg.model.inputs import StepInputs
from thalweg.types import Event, GenerateRequest, SampledToken, SamplingParams, TokenEvent

LENGTHS = (1, 5, 60, 127, 128, 300, 1025, 4000)
OUTPUT_TOKENS = 140  # crosses the end of an entry of 128 tokens
TIMED_TOKENS = 200


class Keeping(Sampler):
    """Keeps the logits of every output token."""

    def __init__(self, own: Sampler) -> None:
        super().__init__(own._eos, own._kernel)
        self.rows: dict[tuple[str, int], Tensor] = {}

    def sample(self, logits: Tensor, sequences: list[Sequence], seeds: list[int]) -> list[SampledToken | ThalwegError]:
        for row, sequence in zip(logits, sequences, strict=True):
            self.rows[sequence.request_id, len(sequence)] = row.cpu()
        return super().sample(logits, sequences, seeds)


class Unwaiting:
    """Steps during which torch raises where the host would wait for the device."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def forward(self, step: StepInputs) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._steps.forward(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    given = parser.parse_args()
    flags = {"model": given.model, "max_num_seqs": given.max_num_seqs, "device": "cuda", "max_model_len": 1 << 16}
    begin = time.monotonic()
    runtime = build_runtime(load_options(flags, environment={}))
    started = time.monotonic() - begin
    free, total = torch.cuda.mem_get_info()
    runner: Any = runtime.engine._runner  # type: ignore[attr-defined]
    graphs, sampler = runner.steps, runner._sampler
    assert isinstance(graphs, GraphedModel) and graphs.captured, "nothing was captured"
    plain = GraphedModel(graphs._model, graphs._cache, graphs._device, graphs._limits, None)
    runtime.engine.start()
    rows, seconds = {}, {}
    for name, steps in (("graphs", graphs), ("kernel by kernel", plain)):
        keeping = Keeping(sampler)
        runner.steps, runner._sampler = Unwaiting(steps), keeping
        together(runtime, name, LENGTHS, OUTPUT_TOKENS)
        rows[name] = {(request.split("/")[1], at): row for (request, at), row in keeping.rows.items()}
        runner.steps, runner._sampler = steps, sampler
        seconds[name] = {
            count: together(runtime, f"{name} {count}", [200] * count, TIMED_TOKENS) / TIMED_TOKENS
            for count in (1, given.max_num_seqs)
        }
    runtime.engine.close()
    differing = [key for key, row in rows["graphs"].items() if not torch.equal(row, rows["kernel by kernel"][key])]
    found = {
        "device": torch.cuda.get_device_name(),
        "commit": commit_name(),
        "choices": {choice.what: [choice.value, choice.reason] for choice in runtime.choices},
        "start_seconds": started,
        "graphs": graphs.captured,
        "rows": len(rows["graphs"]),
        "rows_with_other_bits": len(differing),
        "compiled_in_serving": runtime.kernel_set.compilations.in_serving,
        "free_bytes_after_start": free,
        "free_bytes_at_the_end": torch.cuda.mem_get_info()[0],
        "total_bytes": total,
        "step_seconds": seconds,
    }
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    assert not differing, f"graphs gave other bits: {differing[:5]}"
    assert not found["compiled_in_serving"], "something was compiled while serving"


def together(runtime: Runtime, name: str, lengths: tuple[int, ...] | list[int], tokens: int) -> float:
    """Seconds from the first output token to the last, of requests that run beside each other."""
    marks: list[float] = []
    waiting = [threading.Event() for _ in lengths]
    random = np.random.default_rng(1)

    def listener(done: threading.Event) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, TokenEvent):
                marks.append(time.monotonic())
                assert event.error is None, event.error
                if event.finish is not None:
                    done.set()

        return listen

    for number, (length, done) in enumerate(zip(lengths, waiting, strict=True)):
        prompt = random.integers(100, runtime.model_config.vocab_size - 100, length).astype(np.int32)
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = GenerateRequest(f"{name}/{number}", prompt, sampling, cache_salt=name)
        runtime.engine.submit(request, listener(done))
    assert all(done.wait(600) for done in waiting), "a request has no end"
    return marks[-1] - marks[0]


if __name__ == "__main__":
    main()
