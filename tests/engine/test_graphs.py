"""Engines whose decode steps are captured: the answers of engines that compute every step, and after the warm-up no
capture is left to a request."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.engine.assembly import MODELS, RecordingSampler, Shape, engine_of, prompt_of, submit
from tests.kernels.backends import COMPILED
from tests.model.fields import FLASH_LIKE, PRO_LIKE
from tests.model.geometries import config_of
from thalweg.engine.runner import ModelRunner
from thalweg.engine.warmup import WarmUp
from thalweg.kernels.compilations import Compilations
from thalweg.memory.capacity import CachePlan
from thalweg.model.graphs import GraphedModel, StepLimits
from thalweg.model.padding import bucket_of, buckets

LEVEL = list(COMPILED)[-1].removeprefix("cpu-")
SHAPE = Shape(kernels=LEVEL, prefix_caching=False, max_running=5, max_step_tokens=64)
LIMITS = StepLimits(sequences=5, context=9000)
LENGTHS = (1, 60, 131, 300, 40, 127, 90)


class Noting:
    """A capture on a CPU that computes again, and notes what it records as a GPU's does."""

    def __init__(self, compilations: Compilations) -> None:
        self._compilations = compilations

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._compilations.note("a graph")
        return compute


def runner_of(fields: dict, compilations: Compilations | None) -> tuple[ModelRunner, CachePlan, RecordingSampler]:
    sampler = RecordingSampler()
    runner, plan = MODELS.runner(fields, SHAPE, sampler)
    model = runner.steps._model
    if compilations is not None:
        runner.steps = GraphedModel(model, runner.arena, torch.device("cpu"), LIMITS, Noting(compilations))
    return runner, plan, sampler


def answers(fields: dict, runner: ModelRunner, plan: CachePlan) -> list[list[int]]:
    engine = engine_of(fields, runner, plan, SHAPE)
    outcomes = [
        submit(engine, str(i), prompt_of(i, length), max_tokens=140 - 17 * i, temperature=0.7 * (i % 2), seed=i)
        for i, length in enumerate(LENGTHS)
    ]
    assert all(outcome.done.wait(60) for outcome in outcomes)
    engine.close()
    return [outcome.tokens for outcome in outcomes]


@pytest.mark.parametrize("fields", [FLASH_LIKE, PRO_LIKE])
def test_answers_and_bits_with_nothing_left_to_capture(fields: dict) -> None:
    plain, plan, expected_rows = runner_of(fields, None)
    expected = answers(fields, plain, plan)
    compilations = Compilations()
    runner, plan, rows = runner_of(fields, compilations)
    warm_up = WarmUp(config_of(fields), plan.groups, LIMITS)
    for step in warm_up.graphs():
        runner.run(step)
    rows.rows.clear()
    assert compilations.warmed_up == runner.steps.captured > 10
    compilations.begin_serving()
    assert answers(fields, runner, plan) == expected
    assert compilations.in_serving == 0
    assert rows.rows.keys() == expected_rows.rows.keys()
    for name, of_request in expected_rows.rows.items():
        assert all(torch.equal(row, rows.rows[name][place]) for place, row in of_request.items()), name


@pytest.mark.parametrize(("sequences", "context"), [(5, 9000), (33, 1 << 20), (2, 128), (4, 100)])
def test_the_warm_up_reaches_every_bucket(sequences: int, context: int) -> None:
    """Each by a step of its own; only where no context is long enough to complete an entry there is none."""
    config = config_of(FLASH_LIKE)
    runner, plan, _ = runner_of(FLASH_LIKE, None)
    steps = [
        runner._builder.build(step) for step in WarmUp(config, plan.groups, StepLimits(sequences, context)).graphs()
    ]
    found = [bucket_of(step, context) for step in steps]
    known = list(buckets(config, sequences, context))
    reachable = [bucket for bucket in known if context >= config.unit_tokens or not bucket.hca]
    assert found == reachable


def test_prompts_of_every_kind_are_warmed_up() -> None:
    config = config_of(FLASH_LIKE)
    runner, plan, _ = runner_of(FLASH_LIKE, Compilations())
    steps = list(WarmUp(config, plan.groups, StepLimits(3, 600)).prompts(64))
    lengths = {step.sequences[-1].tokens for step in steps}
    assert {2, 16, 17, 64} <= lengths and max(step.tokens for step in steps) == 64
    assert {step.sequences[-1].samples for step in steps} == {True, False}
    assert {step.sequences[-1].start for step in steps} == {0, 300}
    for step in steps:
        runner.run(step)
