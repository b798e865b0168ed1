"""Runs step plans on a model. The engine sees only `Runner`, so a simulator can put a null runner in its place."""

from __future__ import annotations

from typing import Protocol

import torch

from thalweg.engine.batch import BatchBuilder
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.sampler import Sampler
from thalweg.kernels.ops import MakeRepeat
from thalweg.memory.arena import CacheArena
from thalweg.model.repeat import RepeatedModel
from thalweg.model.transformer import Model
from thalweg.types import SampledToken


class Runner(Protocol):
    """Computes a step. May raise; the requests of that step then fail and the engine goes on."""

    def run(self, plan: StepPlan) -> StepResult: ...


class ModelRunner:
    """The real one: builds the batch, runs the model over the arena, samples."""

    def __init__(
        self,
        model: Model,
        arena: CacheArena,
        builder: BatchBuilder,
        sampler: Sampler,
        repeat: MakeRepeat | None = None,
    ) -> None:
        self._model = RepeatedModel(model, arena, repeat and repeat((*model.memory(), *arena.memory())))
        self.arena = arena
        self._builder = builder
        self._sampler = sampler

    def run(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            logits = self._model.forward(self._builder.build(plan))
            sequences = [item.running.sequence for item in plan.sequences if item.samples]
            sampled = self._sampler.sample(logits, sequences, [s.seed for s in sequences])
        outcomes = list(zip(sequences, sampled, strict=True))
        return StepResult(
            {s.request_id: t for s, t in outcomes if isinstance(t, SampledToken)},
            {s.request_id: t for s, t in outcomes if not isinstance(t, SampledToken)},
        )
