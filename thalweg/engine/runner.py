"""Runs step plans on a model. The engine sees only `Runner`, so a simulator can put a null runner in its place."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from thalweg.engine.batch import BatchBuilder
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.sampler import Sampler
from thalweg.kernels.registry import KernelSet
from thalweg.memory.arena import CacheArena
from thalweg.model.graphs import GraphedModel, StepLimits
from thalweg.model.inputs import StepInputs
from thalweg.model.repeat import RepeatedModel
from thalweg.model.transformer import Model
from thalweg.types import SampledToken


class Runner(Protocol):
    """Computes a step. May raise; the requests of that step then fail and the engine goes on."""

    def run(self, plan: StepPlan) -> StepResult: ...


class Steps(Protocol):
    """Computes what a step's inputs describe: logits fp32 [O, vocab], to be read before the next step."""

    def forward(self, step: StepInputs) -> Tensor: ...


def steps_of(model: Model, arena: CacheArena, kernel_set: KernelSet, limits: StepLimits) -> Steps:
    """The way in which these kernels compute steps: on a CPU small ones are repeated, on a GPU decodes are graphs."""
    if arena.device.type == "cpu":
        make = kernel_set.repeat
        return RepeatedModel(model, arena, make and make((*model.memory(), *arena.memory())))
    return GraphedModel(model, arena, arena.device, limits, kernel_set.capture)


class ModelRunner:
    """The real one: builds the batch, runs the model over the arena, samples."""

    def __init__(self, steps: Steps, arena: CacheArena, builder: BatchBuilder, sampler: Sampler) -> None:
        self.steps = steps
        self.arena = arena
        self._builder = builder
        self._sampler = sampler

    def run(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            logits = self.steps.forward(self._builder.build(plan))
            sequences = [item.running.sequence for item in plan.sequences if item.samples]
            sampled = self._sampler.sample(logits, sequences, [s.seed for s in sequences])
        outcomes = list(zip(sequences, sampled, strict=True))
        return StepResult(
            {s.request_id: t for s, t in outcomes if isinstance(t, SampledToken)},
            {s.request_id: t for s, t in outcomes if not isinstance(t, SampledToken)},
        )
