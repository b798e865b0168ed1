"""What a surface makes of cells: known functions come back, and every value says how it was come by."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.errors import ConfigError
from thalweg.profiler.surface import Surface, Tag

CONTEXTS = (512, 2048, 8192, 32768)
SHARES = (0.0, 0.5, 0.9, 1.0)


def ttft(context: float, reuse: float) -> float:
    """Overhead, and tokens that cost more the deeper they are."""
    start = reuse * context
    return 0.02 + 1e-4 * (context - start) + 1e-9 * (context**2 - start**2)


def tpot(batch: float, context: float) -> float:
    return 0.002 + batch * (4e-4 + 1e-8 * context)


def prefill() -> Surface:
    cells = [(s, c, s, ttft(c, s), 0.9 * ttft(c, s), 1.2 * ttft(c, s)) for c in CONTEXTS for s in SHARES]
    return Surface(cells, rises=False)


def decode() -> Surface:
    cells = [(b, c, b, tpot(b, c), tpot(b, c), tpot(b, c)) for c in CONTEXTS for b in (1.0, 2.0, 4.0, 8.0)]
    return Surface(cells, rises=True)


def test_cells_are_what_was_measured() -> None:
    for context, share in itertools.product(CONTEXTS, SHARES):
        estimate = prefill().at(context, share)
        assert estimate.tag is Tag.MEASURED
        assert estimate.value == pytest.approx(ttft(context, share))
        assert estimate.low == pytest.approx(0.9 * estimate.value)
        assert estimate.high == pytest.approx(1.2 * estimate.value)


@settings(max_examples=200, deadline=None)
@given(context=st.floats(512, 32768), share=st.floats(0, 1), batch=st.floats(1, 8))
def test_between_cells_it_is_within_a_few_percent(context: float, share: float, batch: float) -> None:
    assert prefill().at(context, share).value == pytest.approx(ttft(context, share), rel=0.08)
    assert decode().at(context, batch).value == pytest.approx(tpot(batch, context), rel=0.03)


@settings(max_examples=100, deadline=None)
@given(noise=st.lists(st.floats(0.7, 1.4), min_size=16, max_size=16), one=st.floats(300, 60000), two=st.floats(0, 1))
def test_more_work_never_takes_less_time(noise: list[float], one: float, two: float) -> None:
    cells = [
        (s, c, s, ttft(c, s) * f, ttft(c, s) * f, ttft(c, s) * f)
        for (c, s), f in zip(itertools.product(CONTEXTS, SHARES), noise, strict=True)
    ]
    surface = Surface(cells, rises=False)
    value = surface.at(one, two).value
    assert surface.at(one, min(1, two + 0.1)).value <= value * (1 + 1e-9)
    if one <= 32768 / 1.1:  # beyond, two rows may be extended differently
        assert surface.at(one * 1.1, two).value >= value * 0.93  # shares are interpolated after contexts


def test_beyond_the_cells_it_says_so() -> None:
    surface = prefill()
    near, far = surface.at(50_000, 0.0), surface.at(200_000, 0.0)
    assert near.tag is Tag.EXTRAPOLATED
    assert near.value == pytest.approx(ttft(50_000, 0), rel=0.02)
    assert near.high is not None and near.low < ttft(50_000, 0) < near.high
    assert far.tag is Tag.BOUND and far.high is None
    assert ttft(32768, 0) < far.value <= ttft(200_000, 0)
    assert surface.at(200_000, 0.7).tag is Tag.BOUND
    small, tiny = surface.at(300, 0.0), surface.at(20, 0.0)
    assert small.tag is Tag.EXTRAPOLATED and tiny.tag is Tag.BOUND
    assert tiny.value == pytest.approx(ttft(512, 0)) and tiny.low == 0.0


def test_batches_beyond_the_last() -> None:
    twelve, sixty = decode().at(8192, 12), decode().at(8192, 60)
    assert twelve.tag is Tag.EXTRAPOLATED and twelve.value == pytest.approx(tpot(12, 8192), rel=0.02)
    assert sixty.tag is Tag.BOUND and sixty.value == pytest.approx(tpot(8, 8192)) and sixty.high is None


def test_the_table_has_the_whole_grid_and_what_lies_beyond() -> None:
    cells = [(s, c, s, *[ttft(c, s)] * 3) for c in CONTEXTS for s in SHARES if (c, s) != (8192, 0.5)]
    points = {(p.x, p.y): p.estimate for p in Surface(cells, rises=False).table(100_000)}
    assert points[8192, 0.5].tag is Tag.INTERPOLATED
    assert points[8192, 0.5].value == pytest.approx(ttft(8192, 0.5), rel=0.1)
    assert points[65536, 0.9].tag is Tag.EXTRAPOLATED
    assert (131072, 0.9) not in points
    assert {p.tag for key, p in points.items() if key[0] <= 32768 and key != (8192, 0.5)} == {Tag.MEASURED}


def test_one_cell_and_none() -> None:
    one = Surface([(0.0, 1000.0, 0.0, 2.0, 1.0, 3.0)], rises=False)
    assert one.at(1000, 0).value == pytest.approx(2.0)
    assert one.at(1000, 0.5).tag is Tag.BOUND
    with pytest.raises(ConfigError):
        Surface([], rises=True).at(1, 1)
    with pytest.raises(ConfigError):
        one.at(float("nan"), 0)


def test_noise_is_pooled_not_followed() -> None:
    random = np.random.default_rng(0)
    noisy = [(0.0, c, 0.0, *[ttft(c, 0) * f] * 3) for c, f in zip(CONTEXTS, random.uniform(0.95, 1.05, 4), strict=True)]
    assert Surface(noisy, rises=False).at(4096, 0.0).value == pytest.approx(ttft(4096, 0), rel=0.08)
