"""The ladder of GPU kernels, the floors under it and the timing of its fourth step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.config.accelerators import accelerator, accelerators
from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.kernels.cases import rows
from thalweg.kernels.cases.serving import STEPS, serving_cases
from thalweg.kernels.floors import Limits, floor
from thalweg.kernels.maturity import DTYPES, Evidence, maturity, read_evidence
from thalweg.kernels.published import published
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.kernels.spec import OPS, spec_of
from thalweg.kernels.triton.backend import triton_hashes
from thalweg.kernels.triton.ceilings import sheet_limits
from thalweg.kernels.triton.offline import ARCHITECTURES
from thalweg.kernels.triton.sources import source_hash
from thalweg.kernels.triton.stopwatch import HostClock
from thalweg.kernels.triton.timing import SERIES, record, series

ARCH = "sm_90a"
HASHES = {"linear": "now"}


def checked(where: str, dtype: str, **changed: Any) -> dict[str, Any]:
    return {"op": "linear", "sources": "now", "where": where, "dtype": dtype, "failures": []} | changed


def compiled(**changed: Any) -> dict[str, Any]:
    return {"op": "linear", "sources": "now", "arch": ARCH, "what": "decode", "faults": []} | changed


def timed(shape: str, share: float, term: str = "memory") -> dict[str, Any]:
    floors, shares = {"measured": {"seconds": 1e-5, "term": term}}, {"measured": share}
    return {"op": "linear", "sources": "now", "arch": ARCH, "shape": shape, "floors": floors, "share_of_floor": shares}


INTERPRETED = tuple(checked("interpreter", dtype) for dtype in DTYPES)
ON_DEVICE = tuple(checked(ARCH, dtype) for dtype in DTYPES)
FAST = (timed("decode 1", 0.7), timed("prefill 8192", 0.65))
STEP = ({"op": "linear", "sources": "now", "arch": ARCH},)


def level(*, of: str = "linear", arch: str = ARCH, hashes: dict[str, str] = HASHES, **lines: Any) -> tuple[int, str]:
    found = maturity(spec_of(of), arch, Evidence(hashes, **lines))
    return found.level, found.why_not


def test_a_level_needs_all_below_it() -> None:
    assert level(hashes={}) == (0, "there is no Triton kernel")
    assert level() == (0, "not checked with float32 inputs in the interpreter")
    assert level(checked=INTERPRETED[:1]) == (0, "not checked with bfloat16 inputs in the interpreter")
    assert level(checked=INTERPRETED) == (1, "not compiled")
    assert level(checked=INTERPRETED, compiled=(compiled(),)) == (2, f"not checked with float32 inputs on {ARCH}")
    known = {"checked": INTERPRETED + ON_DEVICE, "compiled": (compiled(),)}
    assert level(**known) == (3, "not timed in decode")
    assert level(**known, timed=FAST) == (4, "no step was measured")
    assert level(**known, timed=FAST, steps=STEP) == (5, "")
    assert level(checked=ON_DEVICE, compiled=(compiled(),), timed=FAST, steps=STEP)[0] == 0


def test_what_is_wrong_or_slow_or_another_architecture_s_does_not_count() -> None:
    wrong = (*INTERPRETED[:1], checked("interpreter", "bfloat16", failures=["2 x 3: an error of 1"]))
    assert level(checked=wrong) == (0, "wrong in the interpreter: 2 x 3: an error of 1")
    spills = compiled(faults=["spills 8 bytes of registers"])
    assert level(checked=INTERPRETED, compiled=(compiled(), spills)) == (1, "decode: spills 8 bytes of registers")
    assert level(checked=INTERPRETED, compiled=(compiled(),), arch="sm_100a") == (1, "not compiled")
    known = {"checked": INTERPRETED + ON_DEVICE, "compiled": (compiled(),)}
    slow = (timed("decode 1", 0.7), timed("prefill 8192", 0.59))
    assert level(**known, timed=slow) == (3, "prefill 8192: 59% of the floor, 60% asked")
    launch_bound = (timed("decode 1", 0.1, "launch"), timed("prefill 8192", 0.65))
    assert level(**known, timed=launch_bound)[0] == 4


def test_evidence_of_other_sources_does_not_count() -> None:
    old = tuple(line | {"sources": "before"} for line in INTERPRETED)
    assert level(checked=old)[0] == 0


def test_evidence_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "triton_checked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in INTERPRETED))
    found = read_evidence(tmp_path, HASHES)
    assert found.checked == INTERPRETED and found.compiled == ()


@pytest.mark.parametrize("op", [spec.name for spec in OPS])
def test_what_is_recorded_is_of_the_present_kernels(op: str) -> None:
    """A change of a kernel needs its evidence anew: docs/gpu-kernels.md says how to record it."""
    pytest.importorskip("triton")
    recorded = read_evidence(Path(__file__).parents[2] / "benchmarks" / "results", triton_hashes())
    for arch in ARCHITECTURES:
        found = maturity(spec_of(op), arch, recorded)
        assert found.level >= 2, f"{arch}: {found.why_not}"


def test_a_hash_covers_what_a_kernel_file_imports() -> None:
    """backend.py imports sources.py; interpreter.py does not."""
    assert source_hash("backend") != source_hash("sources") != source_hash("interpreter")
    assert source_hash("interpreter") == source_hash("interpreter")


LIMITS = Limits(1e12, {"bf16": 1e14}, 1e13, 2e-6, "thought")


def test_a_floor_is_its_largest_term() -> None:
    linear = spec_of("linear")
    sizes = {"rows": 1, "width": 4096, "outputs": 4096, "element": 2, "weight_element": 2}
    read = floor(linear, sizes, LIMITS)
    assert read.term == "memory" and read.seconds == pytest.approx(linear.bytes(sizes) / 1e12)
    many = floor(linear, sizes | {"rows": 8192}, LIMITS)
    assert many.term == "products" and many.seconds == pytest.approx(2 * 8192 * 4096**2 / 1e14)
    assert floor(linear, sizes | {"width": 16, "outputs": 16}, LIMITS) == floor(
        spec_of("rms_norm"), {"rows": 1, "width": 16, "element": 2}, LIMITS
    )
    mixing = {"rows": 8192, "streams": 4, "hidden": 4096, "iterations": 20, "element": 2}
    assert floor(spec_of("mix_in"), mixing, LIMITS).term == "arithmetic"


@pytest.mark.parametrize("op", [spec.name for spec in OPS])
def test_products_are_part_of_the_arithmetic(op: str) -> None:
    sizes = dict.fromkeys(spec_of(op).sizes, 64)
    assert 0 <= spec_of(op).products(sizes) <= spec_of(op).flops(sizes)


def test_the_floors_of_one_million_tokens() -> None:
    """As in the table of the design: 34.6 MB of FP8 keys take 7.2 us on H200, a prefill of HCA is bound by products."""
    cases = {(case.op, case.shape): case for case in serving_cases(load_model_config("flash"))}
    h200 = sheet_limits(accelerator("H200"))
    scores = floor(spec_of("index_topk"), cases["index_topk", "decode 1, fp8 keys at 1M"].sizes, h200)
    assert scores.term == "memory" and scores.seconds == pytest.approx(7.2e-6, rel=0.02)
    dense = floor(spec_of("attention"), cases["attention", "prefill 8192, all at 1M"].sizes, h200)
    assert dense.term == "products" and dense.seconds == pytest.approx(9e-3, rel=0.05)


def test_serving_asks_for_every_op_in_every_step() -> None:
    cases = serving_cases(load_model_config("pro"))
    assert {case.op for case in cases} == {spec.name for spec in OPS}
    assert all(case.shape.startswith(tuple(STEPS)) for case in cases)


def test_published_figures_are_of_the_same_work() -> None:
    (sglang, vllm) = published("index_topk", "decode 1, fp4 keys at 1M", "H200")
    assert "sglang" in sglang and "10.4 us at 1,048,575" in sglang and "vllm" in vllm
    assert any("FlashMLA" in line for line in published("attention", "prefill 8192, all at 1M", "B200"))
    assert published("rms_norm", "decode 1, hidden 4096", "H100") == []


def test_an_unknown_accelerator_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'H200'"):
        accelerator("h20")
    assert all(one.source and one.bandwidth > 1e12 for one in accelerators().values())


def test_a_time_is_held_beside_every_floor() -> None:
    case = rows.linear("decode 1, 64 to 32", 8, 64, 32)
    taken = series(case, reference_kernels(), (HostClock(),), torch.float32)
    line = record(case, taken, taken, (LIMITS, Limits(1e12, {"bf16": 1e14}, 1e13, 1e-8, "measured")), "bf16")
    assert len(line["runs"]["host"]) == SERIES and line["seconds"]["host"] > 0
    assert line["share_of_floor"]["measured"] == pytest.approx(line["floors"]["measured"]["seconds"] / taken.best)
    assert line["score"] == pytest.approx(0.5)
