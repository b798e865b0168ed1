"""Kernel times: what the table says is found again, odd data is named, and prices grow with the work."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from thalweg.config.model import LayerKind
from thalweg.errors import ConfigError
from thalweg.planner.cost import Origin
from thalweg.planner.kernel_features import KernelQuery
from thalweg.planner.kernel_times import KernelTimes, shape_of, shipped_kernel_times
from thalweg.planner.tables import KernelRow, kernel_rows, read_rows, shipped_kernel_rows

CSA, HCA = shape_of("flash", LayerKind.CSA), shape_of("flash", LayerKind.HCA)
B200 = ("sglang", "B200")


def row(**sizes: object) -> KernelRow:
    """A row of the shipped table by its sizes."""
    return next(r for r in shipped_kernel_rows() if all(getattr(r, name) == value for name, value in sizes.items()))


def test_a_measured_call_is_looked_up() -> None:
    known = row(system="B200", framework="sglang", kind="csa_prefill_module", tp=1, new_tokens=8192, context=131072)
    estimate = shipped_kernel_times().row_estimate(known)
    assert estimate.seconds == known.seconds == 6.7062e-3
    assert estimate.origin is Origin.MEASURED
    assert estimate.low <= estimate.seconds <= estimate.high


@pytest.mark.parametrize(
    ("query", "origin"),
    [
        (KernelQuery(1, 4096, 200_000, 64), Origin.INTERPOLATED),
        (KernelQuery(1, 4096, 200_000, 16), Origin.INTERPOLATED),
        (KernelQuery(1, 4096, 4_000_000, 64), Origin.EXTRAPOLATED),
        (KernelQuery(1, 64, 200_000, 64), Origin.EXTRAPOLATED),
    ],
)
def test_origins(query: KernelQuery, origin: Origin) -> None:
    estimate = shipped_kernel_times().estimate("hca_prefill_module", B200, HCA, query)
    assert estimate.origin is origin
    assert estimate.low < estimate.seconds < estimate.high


def test_a_device_or_framework_without_rows_is_a_bound_and_less_certain() -> None:
    times, query = shipped_kernel_times(), KernelQuery(1, 8192, 262144, 64)
    known, device, framework = (
        times.estimate("csa_prefill_module", key, CSA, query) for key in (B200, ("sglang", "GB300"), ("trtllm", "B200"))
    )
    assert known.origin is not Origin.BOUND
    assert device.origin is framework.origin is Origin.BOUND
    widths = [math.log(e.high / e.low) for e in (known, device, framework)]
    assert widths == sorted(widths)
    assert device.seconds == pytest.approx(known.seconds, rel=0.3)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    times = shipped_kernel_times()
    query = KernelQuery(1, 1, 1024, 64)
    with pytest.raises(ConfigError, match="Did you mean 'H200'"):
        times.estimate("hca_decode_module", ("sglang", "H20"), HCA, query)
    with pytest.raises(ConfigError, match="Did you mean 'hca_decode_module'"):
        times.estimate("hca_decode_modul", B200, HCA, query)
    with pytest.raises(ConfigError, match="Did you mean 'flash'"):
        shape_of("flsh", LayerKind.CSA)


@pytest.mark.parametrize("framework", ["sglang", "vllm"])
@pytest.mark.parametrize("device", ["H100", "H200", "B200", "B300", "GB200"])
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_prefill_grows_with_context_and_tokens(framework: str, device: str, kind: str) -> None:
    times, shape = shipped_kernel_times(), shape_of("pro", LayerKind(kind))

    def seconds(new: int, context: int) -> float:
        return times.estimate(
            f"{kind}_prefill_module", (framework, device), shape, KernelQuery(1, new, context, 16)
        ).seconds

    depths = [seconds(8192, 16384 * 2**i) for i in range(7)]
    assert depths == sorted(depths)
    assert depths[-1] > 2 * depths[0]
    chunks = [seconds(512 * 2**i, 131072) for i in range(6)]
    assert chunks == sorted(chunks)


@pytest.mark.parametrize("device", ["H200", "B200", "GB200"])
def test_decodes_grow_with_batch_and_within_a_path_with_context(device: str) -> None:
    times = shipped_kernel_times()

    def seconds(batch: int, context: int) -> float:
        return times.estimate("csa_decode_module", ("sglang", device), CSA, KernelQuery(batch, 1, context, 64)).seconds

    batches = [seconds(2**i, 8192) for i in range(0, 9, 2)]
    assert batches == sorted(batches)
    for path in ((8192, 32768, 65536), (131072, 262144, 524288, 1048576)):
        found = [seconds(1, context) for context in path]
        assert found == sorted(found)


def test_the_switch_of_a_decodes_path_is_found_and_followed() -> None:
    times = shipped_kernel_times()
    assert times.switches == {"sglang": (65536, 131072)}
    slow, unsure, fast = (
        times.estimate("csa_decode_module", B200, CSA, KernelQuery(1, 1, context, 64))
        for context in (60_000, 80_000, 140_000)
    )
    assert fast.seconds < 0.75 * slow.seconds
    assert unsure.low < 1.1 * fast.seconds  # between the two contexts either path may be taken
    assert unsure.high > 0.95 * slow.seconds


def test_odd_rows_are_named_and_do_not_move_the_fit() -> None:
    kind = "hca_prefill_module"
    rows = [r for r in shipped_kernel_rows() if r.kind == kind]
    wrong = row(system="B200", framework="sglang", kind=kind, model="pro", tp=8, new_tokens=8192, context=262144)
    spoiled = KernelTimes([replace(r, seconds=1.4 * r.seconds) if r == wrong else r for r in rows])
    findings = [f for f in spoiled.findings() if kind in f.what and "on B200:" in f.what]
    assert [r.context for f in findings for r in f.rows] == [262144]
    clean, still = (
        t.estimate(kind, B200, shape_of("pro", LayerKind.HCA), KernelQuery(1, 8192, 250_000, 16)).seconds
        for t in (KernelTimes(rows), spoiled)
    )
    assert still == pytest.approx(clean, rel=0.02)


def test_known_trouble_of_the_shipped_table_is_named() -> None:
    words = [f.what for f in shipped_kernel_times().findings()]
    assert any("sglang: CSA decode takes another, faster path between 65,536 and 131,072" in w for w in words)
    assert any("vllm: csa_prefill_module is faster at 57,344 tokens than at 0" in w for w in words)


def test_a_row_that_is_none_is_refused_by_its_line() -> None:
    rows = read_rows("v4_kernel_times.csv")[:3]
    rows[1] = {**rows[1], "latency_ms": "fast"}
    with pytest.raises(ConfigError, match=r"line 3 of mine\.csv"):
        kernel_rows(rows, "mine.csv")
