"""A line through measured steps, its file, and the grains that simulations ask it in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from thalweg.errors import ConfigError
from thalweg.planner.coarse_cost import CoarseCost
from thalweg.planner.cost import Origin, StepWork
from thalweg.planner.linear_cost import LinearCost
from thalweg.planner.scenario import load_cost

TRUE = LinearCost(0.003, 4e-5, 2e-10, 1.5e-4, 5e-9)


def measured(noise: float, seed: int = 1) -> list[tuple[StepWork, float]]:
    random = np.random.default_rng(seed)
    works = [StepWork(((int(random.integers(16, 2048)), int(random.integers(0, 200_000))),)) for _ in range(80)]
    works += [StepWork.decode(int(random.integers(1, 32)), int(random.integers(1, 200_000))) for _ in range(80)]
    return [(w, TRUE.seconds(w) * float(np.exp(noise * random.standard_normal()))) for w in works]


def test_the_fit_finds_the_coefficients_and_an_interval_that_holds() -> None:
    exact = LinearCost.fitted(measured(0.0))
    for name in ("step", "new_token", "new_token_context", "decode", "decode_context"):
        assert getattr(exact, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    held_out = []
    for seed in range(6):
        noisy = LinearCost.fitted(measured(0.1, seed))
        held_out += [(noisy.estimate(work), seconds) for work, seconds in measured(0.1, seed=100 + seed)]
    assert 0.7 < np.mean([e.low <= seconds <= e.high for e, seconds in held_out]) < 0.87
    assert np.median([abs(e.seconds / seconds - 1) for e, seconds in held_out]) < 0.1
    assert noisy.estimate(StepWork.prefill(128, 5000)).origin is Origin.INTERPOLATED
    assert noisy.estimate(StepWork.prefill(128, 500_000)).origin is Origin.EXTRAPOLATED


def test_our_own_engine_s_steps_are_near_a_line() -> None:
    from thalweg.planner.accuracy_steps import step_rows
    from thalweg.planner.tables import read_rows

    cost, steps = load_cost("engine"), step_rows(read_rows("engine_steps.csv"))
    errors = np.array([abs(cost.seconds(work) / seconds - 1) for work, seconds in steps])
    assert np.median(errors) < 0.06 and np.quantile(errors, 0.9) < 0.2


def test_files_of_costs(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    TRUE.save(file)
    assert load_cost(str(file)) == TRUE
    fields = json.loads(file.read_text())
    for changed, said in (
        ({"decode": -1}, "decode is -1, not a number of at least 0"),
        ({"decoed": 1}, "no such field 'decoed'. Did you mean 'decode'?"),
    ):
        file.write_text(json.dumps({**fields, **changed}))
        with pytest.raises(ConfigError, match=said):
            load_cost(str(file))
    file.write_text(json.dumps({"step": 1}))
    with pytest.raises(ConfigError, match="new_token is missing"):
        load_cost(str(file))
    rows = tmp_path / "steps.csv"
    rows.write_text("chunks,seconds\n512+0,0.1\n")
    with pytest.raises(ConfigError, match="lacks the columns"):
        load_cost(str(rows))
    rows.write_text(
        "chunks,decodes,decode_tokens,decode_context,longest_context,sampled,seconds\n512+0,0,0,0,0,0,0.1\n"
    )
    with pytest.raises(ConfigError, match="1 measured steps; at least 5"):
        load_cost(str(rows))


def test_grains_change_a_price_by_less_than_they_change_the_context() -> None:
    coarse, random = CoarseCost(TRUE), np.random.default_rng(3)
    for _ in range(300):
        batch, context = int(random.integers(1, 64)), int(random.integers(1, 1_000_000))
        work = StepWork.decode(batch, context)
        assert coarse.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.008)
        price, steps = coarse.decodes(batch, work.decode_context, work.longest_context)
        for ahead in (0, steps - 1):
            later = StepWork((), batch, batch, work.decode_context + ahead * batch, work.longest_context + ahead, batch)
            assert coarse.seconds(later) == price
