"""Plans: what fits, in which order, with which proof, and what the report says of it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.commands import run
from tests.profiler.test_profile import profile
from thalweg.cli.main import app
from thalweg.config.model_parse import load_model_config
from thalweg.config.options import load_options, profile_names
from thalweg.errors import ConfigError
from thalweg.planner.advice import Advice, Objectives, Question, advise, evaluate, order
from thalweg.planner.candidates import Candidate, proof, rank_spec, sketch, sketches, unfit
from thalweg.planner.cost import StepWork
from thalweg.planner.curves import frontier, policy_costs, step_parts
from thalweg.planner.demand import Demand, demand_of, summed
from thalweg.planner.endpoint import endpoint_scores, fitted_cost, load_sessions, pool_of
from thalweg.planner.layout import ParallelLayout
from thalweg.planner.linear_cost import LinearCost
from thalweg.planner.platform import Accelerators, MeasuredEndpoint
from thalweg.planner.recommendation import config_text

TP8 = Candidate(ParallelLayout(tp=8))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@cache
def gpus(device: str, count: int = 8, model: str = "flash", quant: str = "mxfp4") -> Accelerators:
    return Accelerators(load_model_config(model), device, count, quant=quant)


@cache
def chat() -> Demand:
    return demand_of(workload="short-chat", requests=24, rate=1.0)


def test_reuse_is_that_of_an_endless_cache(tmp_path: Path) -> None:
    turn = {"input_tokens": 100, "output_tokens": 50}
    session = {"prefix": [["system", 1000]], "turns": [turn, turn]}
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"start": start, **session}) + "\n" for start in (0.0, 10.0)))
    demand = demand_of(trace=path, requests=10)
    prompts, known = [1100, 1250], [0 + 1150, 1000 + 1150]
    assert demand.prompt_tokens == sum(prompts) / 2
    assert demand.reused_tokens == sum(known) / 4
    assert (demand.requests, demand.longest_tokens, demand.rate) == (4, 1300, pytest.approx(0.4))
    assert demand.profile == "short-chat"


@pytest.mark.parametrize("name", ["coding-agents", "rl-rollouts", "short-chat"])
def test_a_trace_of_a_shape_is_known_for_it(name: str) -> None:
    known = demand_of(workload=name, requests=120)
    assert summed("a trace", known.sessions).profile == known.profile


def test_what_does_not_fit_is_named_with_its_budget() -> None:
    refusal = unfit(gpus("H100", 1, "pro", "bf16"), Candidate(ParallelLayout()), chat())
    assert refusal is not None and refusal.budget == "memory"
    assert "GiB per GPU" in refusal.missing
    found, refused = sketches(gpus("H100", 2, "pro"), chat(), Candidate(ParallelLayout()))
    assert not found and {r.budget for r in refused} == {"memory"}
    long = replace(chat(), longest_tokens=5_000_000)
    positions = unfit(gpus("B200"), TP8, long)
    assert positions is not None and positions.budget == "positions" and "3,951,424 more" in positions.missing
    tight = MeasuredEndpoint(load_model_config("default"), "x", LinearCost(1, 1, 0, 1, 0), 30_000_000, ("fp8", "fp8"))
    pool = unfit(tight, Candidate(ParallelLayout()), replace(chat(), longest_tokens=1_000_000))
    assert pool is not None and pool.budget == "pool" and "more than a rank's pools" in pool.missing


def test_a_load_beyond_all_ranks_fails_by_time() -> None:
    found, refused = sketches(gpus("B200", 1), replace(chat(), rate=1e6), Candidate(ParallelLayout()))
    assert not found and refused[0].budget == "time" and "more work than time" in refused[0].missing


def test_more_bandwidth_and_more_engines_are_not_slower() -> None:
    slow, fast = (sketch(gpus(d).cost(TP8.layout, 8192, None), TP8, chat()) for d in ("H100", "B200"))
    assert fast.tpot <= slow.tpot and fast.ttft <= slow.ttft and fast.busy <= slow.busy
    cost = gpus("B200").cost(ParallelLayout(), 8192, None)
    one, four = (sketch(cost, Candidate(ParallelLayout(), engines=n), chat()) for n in (1, 4))
    assert four.busy == pytest.approx(one.busy / 4) and four.tpot <= one.tpot


@pytest.mark.parametrize("layout", [ParallelLayout(tp=8), ParallelLayout(dp=8, expert_parallel=True)])
def test_the_proof_of_memory_adds_up(layout: ParallelLayout) -> None:
    spec, room = rank_spec(gpus("B200"), Candidate(layout))
    found = proof(spec, room)
    assert sum(found.values()) == room.usable == room.weights + room.workspace + room.pool
    assert 0 <= found["left over"] < 0.01 * room.pool


@cache
def advice() -> Advice:
    question = Question(Objectives(1.0, 0.05), price=4.0, host_memory=1 << 30, simulated=2)
    return advise(gpus("B200", 2), chat(), question)


def test_the_order_is_objectives_then_cost() -> None:
    found = advice()
    keys = [order(v, found.question) for v in found.verdicts]
    assert keys == sorted(keys)
    best = found.best
    assert best is not None and not best.missed
    assert best.ttft.low <= best.ttft.value <= best.ttft.high
    assert best.task_dollars == pytest.approx(best.task_gpu_seconds * 4 / 3600)
    assert sum(best.origins.values()) == pytest.approx(1)
    policies = {v.candidate.window_policy for v in found.verdicts}
    assert {"boundary", "full", "interval:4096", "exact-replay"} <= policies
    late = evaluate(gpus("B200", 2), chat(), Question(Objectives(1e-4)), best.candidate)
    assert late.attained == 0 and "over 0.0001 s" in late.missed[0]
    assert order(late, Question(Objectives(1e-4))) > order(best, found.question)


def test_the_recommendation_is_what_serve_reads(tmp_path: Path) -> None:
    found = advice()
    assert found.best is not None
    path = tmp_path / "plan.toml"
    path.write_text(config_text(found, found.best))
    options = load_options({}, file=path, environment={})
    chosen = found.best.candidate
    assert options.max_num_batched_tokens == chosen.chunk_tokens
    assert options.window_policy == chosen.window_policy
    assert options.kv_cache_memory == found.best.pool_bytes
    assert found.demand.profile in path.read_text()


def test_pictures_numbers() -> None:
    assert frontier([(1, 5, "a"), (2, 4, "b"), (1.5, 3, "c"), (3, 1, "d")]) == [(1, 5, "a"), (2, 4, "b"), (3, 1, "d")]
    found = advice()
    assert found.best is not None
    costs = {c.policy: c for c in policy_costs(found, found.best.candidate, 100_000)}
    assert costs["full"].checkpoint_bytes > 30 * costs["interval:4096"].checkpoint_bytes > 0
    assert costs["exact-replay"].checkpoint_bytes == 0
    assert costs["full"].hit_seconds < costs["interval:4096"].hit_seconds < costs["exact-replay"].hit_seconds
    parts = step_parts(gpus("B200", 2), found.best.candidate)
    for some in parts.values():
        assert 0 < sum(p.limit or 0.0 for p in some) < sum(p.seconds for p in some)


def test_a_measured_endpoint_is_fitted_and_checked(tmp_path: Path) -> None:
    known = profile()
    cost = fitted_cost(known)
    cell = known.tpot_cells[0]
    assert cost.tpot(cell).seconds == pytest.approx(cell.typical_seconds, rel=0.3)
    model = load_model_config("default")
    pool = pool_of(known, model)
    assert pool_of(replace(known, endpoint=replace(known.endpoint, stated_capacity_tokens=10**6)), model) > pool
    scores = {(s.layer, s.slice): s for s in endpoint_scores(known, model)}
    assert {("profile", "ttft held out"), ("planner", "tpot held out"), ("load", "ttft p50")} <= set(scores)
    known.write(tmp_path / "profile.json")
    printed = run("plan", "check", "--profile", str(tmp_path / "profile.json"))
    for name in ("ttft held out", "tpot held out", "capacity held out", "requests/s"):
        assert name in printed
    with pytest.raises(ConfigError, match="at least 3 and 2"):
        fitted_cost(replace(known, ttft_cells=()))
    assert "one of them" in run("plan", "check", "--profile", "a.json", "--rows", "b.csv", ok=False)


def test_a_load_is_replayed_as_it_was_sent() -> None:
    load = profile().loads[0]
    sessions = list(load_sessions(load))
    own = [s for s in sessions if s.name.startswith("client")]
    assert sum(len(s.turns) for s in own) == load.requests and len(own) == load.concurrency
    assert all(turn.prompt_tokens == load.context_tokens for s in own for turn in s.turns)


def test_the_command_writes_page_rows_and_options(tmp_path: Path) -> None:
    profile(0.05).write(tmp_path / "profile.json")
    page, rows, options = tmp_path / "plan.html", tmp_path / "plan.csv", tmp_path / "plan.toml"
    printed = run(
        "plan", "--workload", "short-chat", "--requests", "12", "--rate", "0.05", "--hardware",
        str(tmp_path / "profile.json"), "--gpus", "1", "--pool-memory", "64MiB", "--ttft", "5",
        "--html", str(page), "--csv", str(rows), "--out-config", str(options),
    )  # fmt: skip
    assert "nearest shipped profile: thalweg serve --profile short-chat" in printed
    assert "measured error, profile ttft held out" in printed
    with rows.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["rank"] for line in lines if line["rank"]] == [str(i + 1) for i in range(len(lines))]
    assert load_options({}, file=options, environment={}).device == "cpu"
    text = page.read_text()
    assert text.count("<svg") == 6 and "http://www.w3.org" in text
    assert "<script" not in text and "src=" not in text, "it needs nothing else"
    titles = "Proof of memory; Time to the first token; Where the cache is full; What a session; Where a step"
    for title in (*titles.split("; "), "Rates of decoding", "Which layout when", "policies cost", "How wrong"):
        assert title in text
    for label in ("context, tokens", "of one session, GiB", "tokens/s of a GPU", "first token p90, s"):
        assert label in text


def test_nothing_that_fits_ends_with_an_error_code() -> None:
    asked = "plan run --workload short-chat --hardware H100 --gpus 1 --model pro --json --requests 3"
    result = CliRunner().invoke(app, asked.split())
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ranked"] == [] and found["infeasible"][0]["budget"] == "memory"


def test_every_shape_is_served_best_under_its_own_profile() -> None:
    lines = [json.loads(line) for line in (RESULTS / "profiles.jsonl").read_text().splitlines()]
    shapes = {line["shape"] for line in lines}
    assert len(lines) == len(shapes) * (1 + len(profile_names())) == 30
    for shape in shapes:
        own = next(line for line in lines if line["shape"] == shape and line["own"])
        others = [line["value"] for line in lines if line["shape"] == shape and line["value"] is not None]
        if own["less_is_better"]:
            assert own["value"] <= 1.02 * min(others), shape
        else:
            assert own["value"] >= 0.98 * max(others), shape
    for line in lines:
        options = load_options({}, profile=None if line["profile"] == "defaults" else line["profile"], environment={})
        assert {name: getattr(options, name) for name in line["options"]} == line["options"], "made anew since"


def test_decode_steps_of_an_endpoint_have_parts() -> None:
    cost = LinearCost(1e-3, 1e-5, 1e-9, 1e-4, 1e-8)
    work = StepWork(((100, 1000),), 2, 2, 500, 300, 2)
    assert sum(cost.parts(work).values()) == pytest.approx(cost.seconds(work))
