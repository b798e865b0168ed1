"""Decode steps that are repeated as one call give the bits of steps that are computed call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.assembly import MODELS, RecordingSampler, Shape, engine_of, prompt_of, submit
from tests.kernels.backends import COMPILED
from tests.model.fields import FLASH_LIKE
from thalweg.config.model_parse import parse_model_config
from thalweg.engine.warmup import WarmUp
from thalweg.kernels.ops import Repeat
from thalweg.memory.layout import RowFormat
from thalweg.model.graphs import StepLimits

FLOAT32, BFLOAT16, FP8, FP4 = RowFormat.FLOAT32, RowFormat.BFLOAT16, RowFormat.FP8, RowFormat.FP4
FORMATS = [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (FP8, FP4), (FP8, FP8)]
LENGTHS = (1, 60, 131, 300)
LEVELS = [name.removeprefix("cpu-") for name in COMPILED]  # lowest first
OUTPUT = 140  # crosses the end of an entry of 128 tokens


def logits(fields: dict[str, Any], shape: Shape, *, repeated: bool) -> tuple[dict[str, dict[int, torch.Tensor]], Any]:
    """Of every output token of prompts that run together, and what repeated the steps."""
    sampler = RecordingSampler()
    runner, plan = MODELS.runner(fields, shape, sampler)
    repeat: Repeat | None = runner.steps._repeat
    if not repeated:
        runner.steps._repeat = None
    engine = engine_of(fields, runner, plan, shape)
    outcomes = [
        submit(engine, str(i), prompt_of(i, length), max_tokens=OUTPUT - 20 * i) for i, length in enumerate(LENGTHS)
    ]
    assert all(outcome.done.wait(60) for outcome in outcomes)
    steps = engine.status().counters["steps"]
    engine.close()
    return sampler.rows, (repeat, steps)


@pytest.mark.parametrize(("kv", "index"), FORMATS)
@pytest.mark.parametrize("level", LEVELS[-1:])
def test_bits_in_every_format(fields: dict, level: str, kv: RowFormat, index: RowFormat) -> None:
    shape = Shape(kernels=level, kv=kv, index=index, prefix_caching=False)
    expected, _ = logits(fields, shape, repeated=False)
    found, (repeat, steps) = logits(fields, shape, repeated=True)
    assert repeat is not None and repeat.repeated > 0.6 * steps, "most steps are repeated"
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert all(torch.equal(row, found[name][place]) for place, row in rows.items()), name


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_bits_at_every_level(level: str) -> None:
    shape = Shape(kernels=level, prefix_caching=False)
    expected, _ = logits(FLASH_LIKE, shape, repeated=False)
    found, (repeat, steps) = logits(FLASH_LIKE, shape, repeated=True)
    assert repeat is not None and repeat.repeated > 0.6 * steps
    assert all(torch.equal(row, found[name][place]) for name, rows in expected.items() for place, row in rows.items())


@pytest.mark.parametrize("level", LEVELS[-1:])
def test_after_the_warm_up_small_decodes_have_nothing_to_note(level: str) -> None:
    """Whatever entries a request completes, all of its decodes are repeated."""
    shape = Shape(kernels=level, prefix_caching=False)
    runner, plan = MODELS.runner(FLASH_LIKE, shape)
    warm_up = WarmUp(parse_model_config(FLASH_LIKE), plan.groups, StepLimits(8, 1 << 14))
    steps = [step for step in warm_up.small_decodes(2) for _ in range(2)]
    for step in steps:
        runner.run(step)
    repeat = runner.steps._repeat
    noted, before = set(repeat._noted), repeat.repeated
    assert len(noted) == 3 + 4, "one completes no entry, one, or one of each kind; two of them also two"
    engine = engine_of(FLASH_LIKE, runner, plan, shape)
    alone = submit(engine, "alone", prompt_of(1, 40), max_tokens=100)
    assert alone.done.wait(60)
    assert set(repeat._noted) - noted == set() and repeat.repeated - before == 99
    engine.close()
