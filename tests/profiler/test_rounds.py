"""Times of cells that take turns on a machine that others use too."""

from __future__ import annotations

import numpy as np
import pytest

from thalweg.profiler.rounds import shared_by_round, typical


def busy(seed: int, missing: float = 0.0) -> dict[str, dict[int, float]]:
    """Five cells in nine rounds; the machine is up to three times slower in some of them."""
    random = np.random.default_rng(seed)
    slow = np.exp(random.uniform(0, 1.1, 9))
    return {
        str(cell): {t: cell * slow[t] * random.uniform(0.97, 1.03) for t in range(9) if random.random() >= missing}
        for cell in range(1, 6)
    }


def test_what_a_round_has_in_common_is_no_property_of_cells() -> None:
    for seed in range(20):
        times = busy(seed, missing=0.25)
        found = typical(times, shared_by_round(times))
        ratios = [found[cell] / float(cell) for cell in found]
        assert max(ratios) / min(ratios) < 1.08


def test_a_cell_that_was_no_part_of_it_is_put_on_the_same_scale() -> None:
    times = busy(3)
    shared = shared_by_round({cell: rounds for cell, rounds in times.items() if cell != "4"})
    assert typical({"4": times["4"]}, shared)["4"] / typical(times, shared)["2"] == pytest.approx(2, rel=0.06)


def test_quiet_rounds_change_nothing() -> None:
    times = {"a": {1: 2.0, 2: 2.0, 3: 2.0}, "b": {1: 5.0, 3: 5.0}}
    assert shared_by_round(times) == {1: 0.0, 2: 0.0, 3: 0.0}
    assert typical(times, {}) == {"a": pytest.approx(2.0), "b": pytest.approx(5.0)}
    assert shared_by_round({}) == {} and typical({}, {}) == {}
