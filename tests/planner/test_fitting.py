"""Fits: planted coefficients are found, groups without rows take the shared ones, odd rows are kept out."""

from __future__ import annotations

import numpy as np
import pytest

from thalweg.planner.fitting import GroupedFit

NOISE = 0.012
TRUE = np.array([2.0, 0.0, 5.0])


def table(seed: int, rows: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts, places and times of calls whose time is `scale` * parts @ TRUE."""
    random = np.random.default_rng(seed)
    parts = random.uniform(0.1, 3.0, (rows, 3))
    return parts, np.log2(parts), scale * parts @ TRUE


def grouped(*groups: tuple[str, float], rows: int = 30) -> GroupedFit:
    tables = [table(i, rows, scale) for i, (_, scale) in enumerate(groups)]
    keys = [("one", name) for name, _ in groups for _ in range(rows)]
    return GroupedFit(keys, *(np.concatenate(column) for column in zip(*tables, strict=True)), NOISE)


def test_planted_coefficients_are_found() -> None:
    fit = grouped(("a", 1.0)).fit(("one", "a"))
    assert fit.coefficients == pytest.approx(TRUE, abs=0.05)
    assert not fit.odd


def test_groups_of_their_own_speed_are_told_apart() -> None:
    fits = grouped(("a", 1.0), ("b", 3.0))
    parts, places, _ = table(9, 5)
    for place, part in zip(places, parts, strict=True):
        slow, fast = (fits.fit(("one", name)).seconds(part, place) for name in ("b", "a"))
        assert slow / fast == pytest.approx(3.0, rel=0.1)


def test_a_group_without_rows_takes_what_its_beginning_knows() -> None:
    fits = grouped(("a", 1.0), ("b", 2.0))
    parts, places, _ = table(9, 1)
    between = fits.fit(("one", "unknown")).seconds(parts[0], places[0])
    assert fits.known(("one", "unknown")) == ("one",)
    assert fits.known(("other", "a")) == ()
    assert fits.fit(("one", "a")).seconds(parts[0], places[0]) < between
    assert between < fits.fit(("one", "b")).seconds(parts[0], places[0])


def test_a_row_that_its_neighbours_contradict_is_kept_out() -> None:
    parts, _, seconds = table(3, 40)
    seconds[7] *= 1.5
    places = np.zeros((40, 1))
    fit = GroupedFit([("x",)] * 40, parts, places, seconds, NOISE).fit(("x",))
    assert fit.odd == (7,)
    assert fit.coefficients == pytest.approx(TRUE, abs=0.05)


def test_the_correction_fades_away_from_its_rows() -> None:
    parts = np.ones((8, 1))
    seconds = np.where(np.arange(8) < 4, 1.0, 1.1)
    places = np.where(np.arange(8) < 4, 0.0, 40.0)[:, None]
    fit = GroupedFit([("x",)] * 8, parts, places, seconds, NOISE).fit(("x",))
    near, far = (fit.seconds(parts[0], np.array([place])) for place in (0.0, 1000.0))
    assert near == pytest.approx(1.0, rel=0.01)
    assert far == pytest.approx(float(fit.coefficients[0]))
