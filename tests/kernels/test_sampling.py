"""sample against a twin in plain Python: the token whose share of the kept probabilities holds the uniform number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import Kernels, every_backend, interpreted

NEAR = 1e-5  # of the sum of all probabilities: what fp32 sums may move a boundary


def drawn_from(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[tuple]:
    """(id, cumulated probability before, and with it) of the kept tokens in order, in float64, of a sum of 1."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    whole = math.fsum(weights)
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    kept, before = [], 0.0
    for place, token in enumerate(order):
        share = weights[token] / whole
        cut = (0 < top_k <= place) or (top_p < 1 and before >= top_p) or share < min_p * weights[order[0]] / whole
        if place and cut:
            break
        kept.append((token, before, before + share))
        before += share
    return kept


def checked(kernels: Kernels, logits: Tensor, controls: list[tuple[float, ...]]) -> Tensor:
    """Every token's share holds the uniform number, within NEAR; the tokens."""
    tokens = kernels.sample(logits, torch.tensor(controls, dtype=torch.float64))
    assert tokens.dtype is torch.int64 and tokens.shape == (len(controls),)
    for row, (temperature, *cuts, uniform) in enumerate(controls):
        values, token = logits[row].double().tolist(), int(tokens[row])
        if temperature == 0:
            assert token == values.index(max(values))
            continue
        kept = drawn_from(values, temperature, int(cuts[0]), *cuts[1:])
        target = uniform * kept[-1][2]
        assert any(t == token and low - NEAR <= target <= high + NEAR for t, low, high in kept), (row, token)
    return tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_backend()
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("cuts", [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (40, 0.95, 0.001)])
def test_every_part_of_the_distribution(kernels: Kernels, spread: float, cuts: tuple[int, float, float]) -> None:
    uniforms = [0.0, 0.03, 0.5, 0.87, 0.999, 1 - 2.0**-53]
    logits = random(len(uniforms), 700) * spread
    checked(kernels, logits, [(0.1 + n / 3, *cuts, uniform) for n, uniform in enumerate(uniforms)])


@every_backend()
def test_equal_logits_are_taken_in_the_order_of_ids(kernels: Kernels) -> None:
    logits = torch.zeros(8, 64)
    logits[:, ::2] = 1.0
    uniforms = [n / 8 + 1e-3 for n in range(8)]
    tokens = checked(kernels, logits, [(1.0, 8, 1.0, 0.0, uniform) for uniform in uniforms])
    assert tokens.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    tokens = checked(kernels, logits, [(1.0, 0, 1.0, 1.0, uniform) for uniform in uniforms])
    assert tokens.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]


@every_backend()
def test_a_cut_among_equals_keeps_the_first_of_them(kernels: Kernels) -> None:
    logits = torch.full((4, 50), -3.0)
    logits[:, [4, 9, 13, 30, 31]] = 2.0
    logits[:, 20] = 2.5
    for uniform in (0.2, 0.6, 0.999):
        checked(kernels, logits, [(1.0, 3, 1.0, 0.0, uniform), (1.0, 0, 0.5, 0.0, uniform)] * 2)
    last = kernels.sample(logits, torch.tensor([[1.0, 3, 1.0, 0.0, 0.999]] * 4, dtype=torch.float64))
    assert last.tolist() == [9] * 4


@every_backend()
def test_masked_logits_are_never_drawn(kernels: Kernels) -> None:
    logits = random(20, 300, seed=3)
    logits[:, :290] = float("-inf")
    logits[3, :299] = float("-inf")
    logits[4, 295:] = -0.0
    logits[4, 290:295] = 0.0
    controls = [(0.0 if n % 7 == 0 else 1.0, n % 4 * 100, 1.0 - n % 3 / 5, 0.0, n / 20) for n in range(20)]
    tokens = checked(kernels, logits, controls)
    assert (tokens >= 290).all() and tokens[3] == 299


@every_backend()
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e3, 1e6])
def test_temperatures_far_from_one(kernels: Kernels, temperature: float) -> None:
    logits = random(3, 90, seed=5) * 3
    checked(kernels, logits, [(temperature, 0, top_p, 0.0, 0.4) for top_p in (1.0, 0.9, 0.0)])


@every_backend()
def test_a_row_does_not_depend_on_others_and_none_is_none(kernels: Kernels) -> None:
    logits = random(9, 5000 if interpreted(kernels) else 129_280) * 2
    controls = torch.tensor([(n / 5, n % 3 * 20, 1 - n / 20, n / 100, n / 9) for n in range(9)], dtype=torch.float64)
    together = kernels.sample(logits, controls)
    for row in range(9):
        assert kernels.sample(logits[row : row + 1], controls[row : row + 1])[0] == together[row]
    assert kernels.sample(logits[:0], controls[:0]).shape == (0,)
