"""Ahead-of-time compilation for Hopper and Blackwell: every kernel as Flash is served with it, and the check itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.kernels.spec import OPS
from thalweg.kernels.triton.offline import ARCHITECTURES, architecture, every_launch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
HOPPER, BLACKWELL = ("HGMMA", "QGMMA"), ("UTCHMMA", "UTCQMMA")


def compiling(*arguments: str) -> Any:
    """What a command prints as JSON in a process that compiles, where this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def flash() -> list[dict[str, Any]]:
    found = compiling("thalweg", "kernels", "compile", "--arch", "sm_90a", "--arch", "sm_100a", "--json")
    return found["kernels"]


@pytest.mark.timeout(900)
def test_no_kernel_spills_or_overflows_on_hopper_or_blackwell(flash: list[dict[str, Any]]) -> None:
    assert [(one["op"], one["what"], one["arch"], one["faults"]) for one in flash if one["faults"]] == []
    assert all(one["blocks_per_multiprocessor"] >= 1 and one["registers"] > 0 for one in flash)


def test_every_op_is_compiled(flash: list[dict[str, Any]]) -> None:
    launches = every_launch(load_model_config("flash"))
    assert len(flash) == 2 * len(launches)
    assert {one["op"] for one in flash} == {spec.name for spec in OPS}


def test_products_run_on_the_newest_tensor_cores(flash: list[dict[str, Any]]) -> None:
    multiply = {(launch.op, launch.what) for launch in every_launch(load_model_config("flash")) if launch.matrix}
    assert {op for op, _ in multiply} >= {"attention", "index_topk", "linear", "grouped_linear", "experts"}
    for one in flash:
        if (one["op"], one["what"]) in multiply:
            wanted = HOPPER if one["arch"] == "sm_90a" else BLACKWELL
            assert any(name in one["matrix"] for name in wanted), (one["op"], one["what"], one["arch"], one["matrix"])


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["flash", "pro", "default"])
def test_all_models_on_all_architectures(model: str) -> None:
    found = compiling("thalweg", "kernels", "compile", "--model", model, "--json")["kernels"]
    assert {one["arch"] for one in found} == set(ARCHITECTURES)
    assert [(one["op"], one["what"], one["arch"], one["faults"]) for one in found if one["faults"]] == []


def test_what_does_not_fit_is_a_fault() -> None:
    found = compiling("tests.kernels.unfit")
    assert found["fits"]["faults"] == [] and found["fits"]["spill_bytes"] == 0
    assert "spills" in found["spills"]["faults"][0] and found["spills"]["spill_bytes"] > 0
    assert any("bytes of shared memory" in fault for fault in found["overflows"]["faults"])
    assert found["no tensor cores"]["faults"] == ["multiplies without tensor cores"]


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sm_100a'"):
        architecture("sm_100")
