"""Runs step plans on a model. The engine sees only `Runner`, so a simulator can put a null runner in its place."""

from __future__ import annotations

import secrets
from typing import Protocol

import torch

from thalweg.engine.batch import BatchBuilder
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.request import Sequence
from thalweg.engine.sampler import Sampler
from thalweg.memory.arena import CacheArena
from thalweg.model.transformer import Model


class Runner(Protocol):
    """Computes a step. May raise; the requests of that step then fail and the engine goes on."""

    def run(self, plan: StepPlan) -> StepResult: ...

    def forget(self, request_id: str) -> None: ...


class ModelRunner:
    """The real one: builds the batch, runs the model over the arena, samples."""

    def __init__(self, model: Model, arena: CacheArena, builder: BatchBuilder, sampler: Sampler) -> None:
        self._model = model
        self._arena = arena
        self._builder = builder
        self._sampler = sampler
        self._seeds: dict[str, int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            logits = self._model.forward(self._builder.build(plan), self._arena)
            sequences = [item.running.sequence for item in plan.sequences if item.samples]
            sampled = self._sampler.sample(logits, sequences, [self._seed(s) for s in sequences])
        return StepResult({s.request_id: t for s, t in zip(sequences, sampled, strict=True)})

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._seeds.pop(request_id, None)

    def _seed(self, sequence: Sequence) -> int:
        """The request's own seed, or one drawn for it once."""
        own = sequence.request.sampling.seed
        if own is not None:
            return own % 2**64
        return self._seeds.setdefault(sequence.request_id, secrets.randbits(64))
