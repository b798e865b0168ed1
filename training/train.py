"""Trains the embedded model: `python -m training.train --work DIRECTORY --model DIRECTORY --out DIRECTORY`.

Stages go from short documents with everything visible to long ones with the released window, selection and position
skips. Everything is seeded; a run that was interrupted goes on after the last stage that it finished.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import load_model_config
from thalweg.evaluation.haystack import Text
from thalweg.text.tokenizer import Tokenizer
from training.export import export
from training.initial import initial_weights
from training.needles import Forms, training_batch
from training.network import Request, Result, Weights, forward
from training.stages import STAGES, Stage
from training.text import read_text

REPORT_STEPS = 20
BIAS_STEP = 1e-3


@dataclass(slots=True)
class Run:
    """Everything that a checkpoint of the training holds."""

    config: ModelConfig
    weights: Weights
    matrices: torch.optim.Muon
    others: torch.optim.AdamW
    steps: int = 0
    tokens: int = 0
    done: tuple[str, ...] = ()  # stages


@dataclass(frozen=True, slots=True)
class Data:
    """Where batches come from."""

    forms: Forms
    text: Text
    random: np.random.Generator


def trainable(weights: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices for Muon, and the rest for AdamW; routing tables and biases are not trained by gradient."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, value in weights.items():
        if name.endswith(("tid2eid", "gate.bias")):
            continue
        value.requires_grad_(True)
        inner = ".attn." in name or "shared_experts" in name
        (matrices if inner and value.dim() == 2 and name.endswith(".weight") else others).append(value)
    return matrices, others


def new_run(config: ModelConfig, weights: Weights) -> Run:
    matrices, others = trainable(weights)
    return Run(
        config,
        weights,
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.01),
    )


def save(run: Run, path: Path) -> None:
    state = {
        "weights": {name: value.detach() for name, value in run.weights.items()},
        "optimisers": [run.matrices.state_dict(), run.others.state_dict()],
        "progress": (run.steps, run.tokens, run.done),
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def load(config: ModelConfig, path: Path) -> Run:
    state = torch.load(path)
    run = new_run(config, state["weights"])
    run.matrices.load_state_dict(state["optimisers"][0])
    run.others.load_state_dict(state["optimisers"][1])
    run.steps, run.tokens, run.done = state["progress"]
    return run


def losses(result: Result, targets: Tensor, answer_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross entropy of answers and of text, the indexer's loss, and the share of right answer tokens."""
    each = F.cross_entropy(result.logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    right = (result.logits[:, :answer_rows].argmax(-1) == targets[:, :answer_rows]).float().mean()
    index = torch.stack(result.index_losses).sum() if result.index_losses else torch.zeros(())
    return each[:, :answer_rows].mean(), each[:, answer_rows:].mean(), index, right


def learning_rate(stage: Stage, step: int) -> float:
    """A factor: linear warm-up, then constant or down a half cosine to a twentieth."""
    warm = min(1.0, (step + 1) / stage.warm_steps)
    if not stage.decay:
        return warm
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))


def train_step(run: Run, stage: Stage, data: Data) -> list[float]:
    batch = training_batch(data.forms, data.text, data.random, stage.shape)
    ids, positions, rows, targets = (
        torch.from_numpy(a) for a in (batch.ids, batch.positions, batch.rows, batch.targets)
    )
    crowd = float(stage.crowd ** data.random.random())
    request = Request(ids, positions, rows, stage.window, stage.top_k, crowd)
    result = forward(run.config, run.weights, request)
    answer, plain, index, right = losses(result, targets, batch.answer_rows)
    for optimiser in (run.matrices, run.others):
        optimiser.zero_grad()
    (answer + stage.text_weight * plain + index).backward()
    trained = [p for o in (run.matrices, run.others) for g in o.param_groups for p in g["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    for optimiser in (run.matrices, run.others):
        optimiser.step()  # type: ignore[no-untyped-call]
    for name, load_share in result.loads.items():
        if name in run.weights:
            run.weights[name] += BIAS_STEP * torch.sign(load_share.mean() - load_share)
    run.steps += 1
    run.tokens += ids.numel()
    return [answer.item(), plain.item(), index.item(), right.item()]


def train_stage(run: Run, stage: Stage, data: Data) -> Iterator[str]:
    begin, seen = time.monotonic(), []
    for step in range(stage.steps):
        factor = learning_rate(stage, step)
        for optimiser, rate in ((run.matrices, stage.matrix_rate), (run.others, stage.other_rate)):
            optimiser.param_groups[0]["lr"] = rate * factor
        seen.append(train_step(run, stage, data))
        if (step + 1) % REPORT_STEPS == 0 or step + 1 == stage.steps:
            answer, plain, index, right = np.mean(seen[-REPORT_STEPS:], 0)
            yield (
                f"{stage.name} {step + 1}/{stage.steps} tokens {run.tokens / 1e6:.2f}M {time.monotonic() - begin:.0f}s "
                f"answer {answer:.3f} text {plain:.3f} index {index:.3f} right {right:.4f}"
            )
            if stage.enough is not None and right > stage.enough:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where progress is kept")
    parser.add_argument("--model", type=Path, required=True, help="a directory with config.json and the tokenizer")
    parser.add_argument("--out", type=Path, default=None, help="a directory whose model.safetensors is replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.load(options.model)
    config = load_model_config(options.model)
    text = read_text(tokenizer, options.work / "text.npy")
    forms = Forms(tokenizer)
    checkpoint = options.work / "run.pt"
    if checkpoint.exists():
        run = load(config, checkpoint)
    else:
        sample = torch.from_numpy(text.ids[: 16 * 128].reshape(16, 128))
        run = new_run(config, initial_weights(config, options.seed, sample))
    for number, (name, stage) in enumerate(STAGES.items()):
        if name in run.done:
            continue
        random = np.random.default_rng((options.seed, run.steps, number))
        for line in train_stage(run, stage, Data(forms, text, random)):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        run.done += (name,)
        save(run, checkpoint)
    if options.out is not None:
        export(run.weights, options.out)


if __name__ == "__main__":
    main()
