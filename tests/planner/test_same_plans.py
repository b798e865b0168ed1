"""The simulator and the engine with a real model plan the same steps, at the same times, for the same trace."""

from __future__ import annotations

import pytest

from tests.engine.assembly import Shape
from tests.model.fields import FLASH_LIKE, PRO_LIKE
from tests.planner.engine_run import EngineRun, Plans
from tests.planner.traces import COST, random_sessions
from thalweg.planner.coarse_cost import CoarseCost
from thalweg.planner.sim_tiers import TierSpec
from thalweg.planner.simulator import Simulation

HOST = (TierSpec("host", 4_000_000, 2e7, 5e7),)


@pytest.mark.parametrize(
    ("fields", "units", "seed", "tiers"), [(FLASH_LIKE, 16, 1, ()), (PRO_LIKE, 200, 2, ()), (FLASH_LIKE, 16, 1, HOST)]
)
def test_the_engine_and_the_simulator_plan_the_same_steps(fields: dict, units: int, seed: int, tiers: tuple) -> None:
    shape = Shape(max_running=4, max_step_tokens=96, checkpoint_interval=256)
    sessions = random_sessions(seed, 12)
    real = EngineRun(fields, shape, units, CoarseCost(COST), tiers)
    real.run(sessions)
    plans: Plans = []
    simulation = Simulation(
        real.spec(fields, shape), COST, bulk=False, on_plan=lambda plan, at: plans.append((at, plan.description()))
    )
    result = simulation.run(sessions)
    assert plans == real.plans
    rows = [dict(zip(result.requests.names(), row, strict=True)) for row in result.requests.rows()]
    compared = ("finished", "finish", "device_tokens", "host_tokens", "output_tokens")
    assert {row["request"]: tuple(row[name] for name in compared) for row in rows} == real.ends
    assert bool(tiers) is any(row["host_tokens"] for row in rows)
    status = real.engine.status()
    if units < 100:
        assert status.counters["preemptions"] > 0 and status.counters["evicted_units"] > 0
    assert status.counters["preemptions"] == result.replicas[0].preemptions
    assert any(end[1] == "cancelled" for end in real.ends.values())
    assert any(end[2] for end in real.ends.values()), "nothing was cached"
