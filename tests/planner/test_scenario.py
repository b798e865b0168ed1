"""`thalweg simulate`, from its flags to its tables, and its figures beside measured ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.commands import run
from thalweg.planner.scenario import Scenario, parse_layout, simulation_of
from thalweg.planner.trace import Session, Turn

SMALL = (
    "--workload",
    "short-chat",
    "--requests",
    "30",
    "--model",
    "default",
    "--cost",
    "engine",
    "--pool-memory",
    "64MiB",
)


def test_figures_as_json_a_file_and_rows(tmp_path: Path) -> None:
    out, rows = tmp_path / "out.json", tmp_path / "rows.csv"
    printed = json.loads(run("simulate", *SMALL, "--seed", "3", "--json", "--out", str(out), "--csv", str(rows)))
    assert printed == json.loads(out.read_text())
    again = json.loads(run("simulate", *SMALL, "--seed", "3", "--json"))
    for facts in (printed, again):
        facts.pop("simulated_in_seconds")
    assert printed == again and printed["finished"] == {"length": 30} and printed["hit_rate"] > 0.3
    with rows.open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 30 and sum(int(row["prompt_tokens"]) for row in read) == printed["prompt_tokens"]


def test_the_table_for_a_person(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": i * 100, "input_length": 600, "output_length": 9, "hash_ids": [1, i]})
            for i in range(2, 6)
        )
    )
    text = run("simulate", str(trace), "--hardware", "b200", "--layout", "dp2", "--routing", "prefix",
               "--host-memory", "1GiB", "--drafts", "2", "--accepted", "2")  # fmt: skip
    for word in ("ttft", "hit rate", "4 requests (4 length)", "most waiting", "preemptions; evicted: nothing"):
        assert word in text, text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "trace: give a trace file or --workload"),
        (("--workload", "short-chat"), "hardware: give --hardware or --cost"),
        (("--workload", "short-chat", "--cost", "engine"), "pool_memory: needed with --cost"),
        (("--workload", "chat", "--cost", "engine", "--pool-memory", "1GiB"), "workload: 'chat' is none of"),
        ((*SMALL, "--routing", "best"), "routing: 'best' is not one of round-robin"),
        ((*SMALL, "--layout", "tp8x"), "layout: 'tp8x' is not like"),
        ((*SMALL, "--layout", "dp8-ep4"), "experts are spread over all 8 GPUs or none, not 4"),
        ((*SMALL, "--pool-memory", "1MiB"), "pool_memory: 1,048,576 bytes are too few"),
        ((*SMALL, "--replicas", "0"), "replicas: 0 is below 1"),
        ((*SMALL, "--drafts", "1", "--accepted", "3"), "accepted: 3.0 tokens a step cannot come of 1 drafts"),
        ((*SMALL, "--window-policy", "ful"), "Did you mean 'full'"),
    ],
)
def test_wrong_flags_are_named(flags: tuple[str, ...], said: str) -> None:
    assert said in run("simulate", *flags, ok=False)


def test_layouts() -> None:
    assert str(parse_layout("tp4-dp2-ep8")) == "tp4-dp2-ep8" and parse_layout("tp1").gpus == 1


@pytest.mark.parametrize(("layout", "median"), [("tp8", 314.1), ("dp8-ep8", 91.3)])
def test_eight_prompts_of_a_million_tokens_on_eight_gpus(layout: str, median: float) -> None:
    """Measured with vLLM 0.25 on 8 x B200 (vllm-project/vllm#51454): median first-token times of eight at once."""
    scenario = Scenario("flash", workload="short-chat", hardware="B200", layout=layout, routing="least-loaded")
    sessions = [Session(f"p{i}", i * 1e-3, (Turn(((i, 1_044_301),), 100 + i, 16),)) for i in range(8)]
    facts = simulation_of(scenario).run(sessions).summary()
    assert facts["ttft_seconds"]["p50"] == pytest.approx(median, rel=0.1)
    if layout == "tp8":  # one queue; the measured DP ranks had unequal shares, ours have one prompt each
        assert facts["makespan_seconds"] == pytest.approx(501.7, rel=0.2)
