"""Captured steps with a capture that computes again: what a graph would do wrong, such a one does wrong too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import COMPILED, Kernels
from tests.model.fields import FLASH_LIKE, NARROW, PRO_LIKE
from tests.model.geometries import config_of, engine_weights
from tests.model.paging import PagedSequences
from tests.model.test_padding import rows_of, words
from thalweg.model.graphs import GraphedModel, StepLimits
from thalweg.model.numerics import Numerics
from thalweg.model.padding import buckets
from thalweg.model.transformer import Model

CPU = torch.device("cpu")
LENGTHS = (1, 3, 126, 127, 251)
STEPS = 40


class Again:
    """A capture on a CPU: it computes over the same memory, which by then holds another step. Like a graph it gives all
    results in one place, and carries nothing out as it records."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        return compute


def graphed(model: Model, cache: PagedSequences, capture: Again | None) -> GraphedModel:
    return GraphedModel(model, cache, CPU, StepLimits(8, 512), capture)


@pytest.mark.parametrize("kernels", [COMPILED[name]() for name in list(COMPILED)[-1:]], ids=list(COMPILED)[-1:])
@pytest.mark.parametrize("fields", [FLASH_LIKE, PRO_LIKE, NARROW])
def test_replays_give_the_bits_of_steps(fields: dict, kernels: Kernels) -> None:
    """Sequences of other lengths and other blocks come and go, prompts in between; every bucket is recorded once."""
    config = config_of(fields)
    model = Model(config, engine_weights(config), Numerics(), kernels)
    plain, replayed = (PagedSequences(config, len(LENGTHS), 512) for _ in range(2))
    capture = Again()
    steps = graphed(model, replayed, capture)
    positions = [0] * len(LENGTHS)
    for turn in range(STEPS):
        first = turn * 2 % (len(LENGTHS) + 1)
        pieces = []
        for i in range(first, len(LENGTHS)) if first < len(LENGTHS) else range(1):
            count = LENGTHS[i] if positions[i] == 0 else 1
            pieces.append((i, positions[i], words(count, 9 * turn + i)))
            positions[i] += count
        rows = sum(len(ids) for _, _, ids in pieces)
        outputs = list(range(rows)) if rows == len(pieces) else [rows - 1]
        expected = model.forward(plain.inputs(pieces, outputs), plain)
        assert torch.equal(steps.forward(replayed.inputs(pieces, outputs)), expected), turn
        assert all(torch.equal(a, b) for a, b in zip(rows_of(plain, config), rows_of(replayed, config), strict=True))
    assert capture.recorded == steps.captured < 12 < STEPS
    assert steps.captured <= len(list(buckets(config, 8, 512)))


def test_without_a_capture_steps_are_carried_over() -> None:
    config = config_of(NARROW)
    kernels = COMPILED[list(COMPILED)[-1]]()
    model = Model(config, engine_weights(config), Numerics(), kernels)
    plain, other = (PagedSequences(config, 2, 256) for _ in range(2))
    steps = graphed(model, other, None)
    for start, count in ((0, 140), (140, 1), (141, 1)):
        pieces = [(s, start, words(count, start + s)) for s in range(2)]
        assert torch.equal(steps.forward(other.inputs(pieces)), model.forward(plain.inputs(pieces), plain))
    assert steps.captured == 0
