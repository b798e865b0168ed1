"""The accuracy that the planner promises, on measurements that its fits did not see, and the check's own arithmetic."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.commands import run
from thalweg.errors import ConfigError
from thalweg.planner.accuracy import Report, Trial, regret, score
from thalweg.planner.check import check
from thalweg.planner.cost import Estimate, Origin
from thalweg.planner.tables import KERNEL_COLUMNS, SERVING_COLUMNS, read_rows


@pytest.fixture(scope="module")
def report() -> Report:
    return check()


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("layer", "slice_", "most"),
    [
        ("kernel", "interpolated", 0.10),
        ("kernel", "extrapolated to 1M", 0.20),
        ("kernel", "device left out", 0.15),
        ("ops", "interpolated", 0.10),
        ("step", "interpolated", 0.10),
        ("step", "extrapolated to 256K", 0.20),
        ("serving", "claimed", 0.15),
        ("memory", "claimed", 0.03),
    ],
)
def test_the_median_error_is_small(report: Report, layer: str, slice_: str, most: float) -> None:
    found = report.score(layer, slice_)
    assert found.median <= most
    for name, error in found.baselines.items():
        assert found.median < 0.5 * error, f"hardly better than {name}"


def test_long_prefills_are_extrapolated_layer_by_layer(report: Report) -> None:
    for kind in ("csa", "hca"):
        assert report.score("kernel", f"extrapolated to 1M: {kind}_prefill_module, sglang").median <= 0.12


@pytest.mark.parametrize("slice_", ["interpolated", "extrapolated to 1M", "device left out"])
def test_intervals_hold_what_they_say(report: Report, slice_: str) -> None:
    assert 0.75 <= report.score("kernel", slice_).coverage <= 0.85


def test_choices_by_prediction_lose_little(report: Report) -> None:
    assert len(report.regrets) == 3
    assert all(r.mean <= 0.05 for r in report.regrets)


def test_what_is_not_claimed_has_a_reason(report: Report) -> None:
    assert sum(c.claimed for c in report.comparisons) >= 12
    assert all(c.claimed or c.reason for c in report.comparisons)
    assert len(report.comparisons) >= 55  # figures are never dropped


def test_rows_of_a_user_round_trip(report: Report, tmp_path: Path) -> None:
    serving = check(write(tmp_path / "serving.csv", read_rows("v4_measured_serving.csv")))
    assert serving.score("serving", "claimed") == report.score("serving", "claimed")
    assert serving.comparisons == report.comparisons
    kernel = [r for r in read_rows("v4_kernel_times.csv") if r["kind"] == "hca_prefill_module"]
    moved = [{**r, "context": "300000"} for r in kernel if r["context"] == "262144"]
    given = check(write(tmp_path / "kernel.csv", kernel + moved))  # those of the table are not counted
    assert given.score("kernel", "given rows").count == len(moved)
    assert given.score("kernel", "given rows").bias == pytest.approx(0.1, abs=0.05)  # 38K tokens more, the time of less
    assert given.score("kernel", "given rows, extrapolated to 1M").count == len(moved)
    assert [(f.what, len(f.rows)) for f in given.findings] == [("not priced: rows of the table itself", len(kernel))]


def test_rows_that_are_not_priced_are_named(tmp_path: Path) -> None:
    rows = [r for r in read_rows("v4_kernel_times.csv") if r["kind"] == "hca_prefill_module"][:4]
    changes = (
        {"context": "300000"},
        {"system": "l40s"},
        {"kind": "hca_attn_kernel"},
        {"latency_ms": "0.0001", "tp": "2"},
    )
    given = check(write(tmp_path / "rows.csv", [{**r, **c} for r, c in zip(rows, changes, strict=True)]))
    assert given.score("kernel", "given rows").count == 1
    assert len(given.findings) == 3
    assert all(len(f.rows) == 1 for f in given.findings)


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    rows = read_rows("v4_kernel_times.csv")[:2]
    with pytest.raises(ConfigError, match="lacks the columns tp"):
        check(write(tmp_path / "a.csv", [{k: v for k, v in r.items() if k != "tp"} for r in rows]))
    with pytest.raises(ConfigError, match=r"nothing in .* can be compared"):
        check(write(tmp_path / "b.csv", rows))
    with pytest.raises(ConfigError, match="cannot be read"):
        check(tmp_path / "absent.csv")
    assert not set(KERNEL_COLUMNS) <= set(SERVING_COLUMNS)


def test_the_verb_prints_tables_and_json(tmp_path: Path) -> None:
    path = write(tmp_path / "serving.csv", read_rows("v4_measured_serving.csv")[20:22])
    facts = json.loads(run("plan", "check", "--rows", str(path), "--json"))
    assert {layer["layer"] for layer in facts["layers"]} == {"serving", "memory"}
    claimed = [row for row in facts["rows"] if row["claimed"]]
    assert len(claimed) == 4
    assert all(row["low"] <= row["estimate"] <= row["high"] for row in claimed)
    text = run("plan", "check", "--rows", str(path))
    assert "80% holds" in text
    assert "314.1 s" in text


def test_scores_are_medians_of_absolute_relative_errors() -> None:
    def trial(measured: float, width: float) -> Trial:
        return Trial("x", measured, Estimate(1.0, 1 - width, 1 + width, Origin.BOUND), {"twice": 2.0})

    found = score("l", "s", [trial(0.8, 0.1), trial(1.0, 0.1), trial(1.25, 0.3)])
    assert found is not None
    assert (found.median, found.bias) == pytest.approx((0.2, 0.0))
    assert found.coverage == pytest.approx(2 / 3)
    assert found.baselines["twice"] == pytest.approx(1.0)
    assert score("l", "s", []) is None


def test_regret_is_what_the_chosen_loses_to_the_best() -> None:
    found = regret("c", [[(1.0, 5.0), (2.0, 4.0)], [(3.0, 1.0), (4.0, 2.0)], [(1.0, 1.0)]])
    assert found is not None
    assert (found.count, found.right, found.mean) == pytest.approx((2, 0.5, 0.125))
    assert regret("c", [[(1.0, 1.0)]]) is None


def test_the_page_says_what_is_measured(report: Report) -> None:
    lines = {
        "| kernel, interpolated": ("kernel", "interpolated"),
        "| kernel, up to 64K fitted": ("kernel", "extrapolated to 1M"),
        "| kernel, a device left out": ("kernel", "device left out"),
        "| other ops, interpolated": ("ops", "interpolated"),
        "| step, interpolated": ("step", "interpolated"),
        "| step, up to 64K fitted": ("step", "extrapolated to 256K"),
        "| serving, claimed times": ("serving", "claimed"),
        "| memory, claimed capacities": ("memory", "claimed"),
    }
    page = (Path(__file__).parents[2] / "docs" / "planner-accuracy.md").read_text().splitlines()
    for beginning, key in lines.items():
        cells = next(line for line in page if line.startswith(beginning)).split("|")
        found = report.score(*key)
        assert int(cells[2].replace(",", "")) == found.count
        written = [float(cell.strip().rstrip("%")) / 100 for cell in cells[3:7]]
        assert written == pytest.approx([found.median, found.p90, found.bias, found.coverage], abs=0.006)
