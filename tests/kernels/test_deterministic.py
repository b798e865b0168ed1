"""What the deterministic backend rests on: the library's products on tiles, and functions that keep to themselves."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_attention import random
from tests.kernels.test_exact_rows import rows_alone_equal
from tests.kernels.threads import ANY_THREADS, threads
from thalweg.kernels.deterministic.linear import TILE, each_product, product, varying_shapes
from thalweg.kernels.deterministic.sums import folded, sigmoid, softplus
from thalweg.kernels.spec import spec_of
from thalweg.model.rotary import angles

__all__ = ["threads"]
WIDTHS = (1, 4, 8, 15, 24, 33, 48, 64, 96, 100, 128, 192, 512, 1000, 4096)
OUTPUTS = (1, 3, 4, 8, 24, 33, 64, 97, 128, 512, 1024)


@ANY_THREADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear(width: int, dtype: torch.dtype) -> None:
    for outputs in OUTPUTS:
        weight = random(outputs, width, seed=1).to(dtype)
        x = random(TILE + 9, width).to(dtype)
        ours = product(x, weight)
        exact = x.double() @ weight.double().T
        if dtype is torch.float32:
            assert (ours.double() - exact).abs().max() <= spec_of("linear").tolerance * width**0.5
        else:
            assert torch.allclose(ours.double(), exact, rtol=0.02, atol=0.01 * width**0.5)
        for row, place in ((0, 0), (TILE, 5), (3, TILE - 1)):
            alone = product(x[row : row + 1], weight)[0]
            assert torch.equal(alone, ours[row])
            other = torch.full((TILE, width), 3.0, dtype=dtype)
            other[place] = x[row]
            assert torch.equal(product(other, weight)[place], ours[row])


def test_linear_takes_any_memory() -> None:
    """Views that begin anywhere and have gaps, no rows, more axes."""
    weight, wide = random(24, 40), random(50, 3, 41, seed=1)
    view = wide[7:, 1, 1:]
    assert torch.equal(product(view, weight), product(view.contiguous(), weight))
    assert product(view[:0], weight).shape == (0, 24)
    assert torch.equal(product(wide[..., :40], weight)[:, 2], product(wide[:, 2, :40], weight))


def test_start_up_finds_shapes_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random(9, 24), random(4, 2, 7, 33), random(5), torch.zeros((3, 3), dtype=torch.int64)]
    assert varying_shapes(weights) == []
    monkeypatch.setattr(
        "thalweg.kernels.deterministic.linear.product", lambda x, w: x @ w.T + torch.arange(len(x)).unsqueeze(1)
    )
    assert varying_shapes(weights) == [(9, 24), (7, 33)]


@ANY_THREADS
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (4, 64, 24), (6, 32, 512), (64, 512, 128)])
def test_products_of_one_query_each(m: int, k: int, n: int) -> None:
    rows_alone_equal(each_product, random(TILE + 9, m, k), random(TILE + 9, n, k, seed=1).transpose(1, 2))


@ANY_THREADS
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 130])
def test_folded(count: int) -> None:
    x = random(60, count, 7)
    rows_alone_equal(folded, x)
    assert torch.allclose(folded(x), x.sum(1), atol=1e-5)


@ANY_THREADS
@pytest.mark.parametrize("width", [1, 5, 33, 128, 7168])
def test_functions(width: int) -> None:
    x = random(801 if width < 999 else 75, width) * 4
    rows_alone_equal(torch.exp, x)
    rows_alone_equal(sigmoid, x)
    rows_alone_equal(softplus, x)
    assert torch.allclose(sigmoid(x), torch.sigmoid(x), atol=1e-6)
    assert torch.allclose(softplus(x), torch.nn.functional.softplus(x), atol=1e-6)
    far = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])
    assert sigmoid(far).tolist() == pytest.approx([0, 0, 0.5, 0.5, 1, 1], abs=1e-30)
    assert softplus(far)[[0, 1, 4, 5]].tolist() == pytest.approx([0, 0, 100, 1e4], abs=1e-30)


@ANY_THREADS
def test_angles() -> None:
    positions = torch.arange(0, 1_000_000, 9973)
    frequencies = 10000.0 ** -(torch.arange(0, 10, 2) / 10)
    rows_alone_equal(lambda p: (angles(p, frequencies).cos, angles(p, frequencies).sin), positions)
