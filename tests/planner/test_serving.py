"""Closed forms of serving figures, and which published ones they claim."""

from __future__ import annotations

import pytest

from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.planner.hardware import accelerator, link
from thalweg.planner.layout import Deployment, ParallelLayout, Speculation
from thalweg.planner.serving import Serving, SplitServing
from thalweg.planner.serving_rows import acceptance, compare, read_case
from thalweg.planner.step_cost import ModelStepCost
from thalweg.planner.tables import read_rows

FLASH = load_model_config("flash")


def serving(layout: ParallelLayout, speculation: Speculation | None = None, chunk: int = 8192) -> Serving:
    return Serving(ModelStepCost(FLASH, Deployment("sglang", "B200", layout, "mxfp4", chunk, speculation)))


TP8 = serving(ParallelLayout(8, expert_parallel=True))
DP8 = serving(ParallelLayout(1, 8, expert_parallel=True))


def test_a_prompt_is_the_sum_of_its_chunks() -> None:
    steps = list(TP8.chunks(20_000))
    assert [s.chunks for s in steps] == [((8192, 0),), ((8192, 8192),), ((3616, 16384),)]
    assert [s.sampled for s in steps] == [0, 0, 1]
    assert TP8.cold_ttft(20_000).seconds == pytest.approx(sum(TP8.cost.estimate(s).seconds for s in steps))


def test_reuse_saves_what_is_not_computed_and_pays_for_what_is_loaded() -> None:
    cold, warm = TP8.cold_ttft(131072).seconds, TP8.warm_ttft(131072, 129024).seconds
    assert warm < 0.05 * cold
    loaded = TP8.warm_ttft(131072, 129024, loaded_bytes=6_400_000_000).seconds
    assert loaded == pytest.approx(warm + 0.1)  # 64 GB/s
    with pytest.raises(ConfigError, match="reused_tokens: 1024 of a prompt of 1024"):
        TP8.warm_ttft(1024, 1024)


def test_queues_of_equal_prompts() -> None:
    alone = TP8.cold_ttft(65536).seconds
    assert TP8.makespan(8, 65536).seconds == pytest.approx(8 * alone)
    assert TP8.queued_ttft(8, 65536).seconds == pytest.approx(4.5 * alone)
    assert DP8.makespan(8, 65536).seconds == pytest.approx(DP8.cold_ttft(65536).seconds)
    assert DP8.makespan(9, 65536).seconds == pytest.approx(2 * DP8.cold_ttft(65536).seconds)


def test_one_prompt_is_sooner_done_on_tensor_parallel_ranks_eight_on_data_parallel_ones() -> None:
    assert TP8.cold_ttft(1_000_000).seconds < DP8.cold_ttft(1_000_000).seconds
    assert TP8.queued_ttft(8, 1_000_000).seconds > 2 * DP8.queued_ttft(8, 1_000_000).seconds


def test_time_per_token_grows_with_concurrency_and_shrinks_with_acceptance() -> None:
    times = [TP8.tpot(c, 8192, 1024).seconds for c in (1, 2, 4, 8, 16)]
    assert times == sorted(times)
    drafting = serving(ParallelLayout(8, expert_parallel=True), Speculation(3, 3.0))
    assert drafting.tpot(1, 8192, 1024).seconds < 0.6 * times[0]


def test_prompts_and_decodes_on_engines_of_their_own() -> None:
    split = SplitServing(TP8, DP8)
    moved = split.transfer_seconds(1_000_000)
    assert moved == pytest.approx(3.9e9 / 100e9, rel=0.05)  # 3,850 bytes a token over 100 GB/s
    assert split.cold_ttft(1_000_000).seconds == pytest.approx(TP8.cold_ttft(1_000_000).seconds + moved)
    assert split.tpot(64, 8192, 1024).seconds < 0.9 * DP8.tpot(64, 8192, 1024).seconds
    engines = split.prefill_engines(64, 8192, 1024)
    rate = 64 / (1024 * split.tpot(64, 8192, 1024).seconds)  # requests per second of the decode engine
    assert engines == pytest.approx(rate * TP8.cold_ttft(8192).seconds)


def test_acceptance_is_the_measured_one() -> None:
    assert acceptance(3) == 2.97
    assert acceptance(3, thinking=True) == 2.49
    with pytest.raises(ConfigError, match="acceptance is known of"):
        acceptance(9)


def test_a_rows_configuration_is_read() -> None:
    rows = read_rows("v4_measured_serving.csv")
    case = read_case(next(r for r in rows if "TP8 EP8" in r["config"] and r["concurrency"] == "8"))
    assert case.deployment == Deployment("vllm", "B200", ParallelLayout(8, expert_parallel=True), "mxfp4", 8192)
    assert (case.prompt_tokens, case.concurrency, case.utilization) == (1044301, 8, 0.95)
    eagle = read_case(next(r for r in rows if "EAGLE 3-1-4" in r["config"]))
    assert eagle.deployment.speculation == Speculation(3, 2.97)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"isl": "8192"}, "prompts under 65,536 tokens"),
        ({"concurrency": "64"}, "more than 16 in flight"),
        ({"hw": "b100"}, "hardware: 'B100'"),
        ({"hw": "2xRTX PRO 6000"}, "hardware: "),
        ({"config": ""}, "the layout is not stated"),
        ({"config": "TP8 disagg"}, "prefill and decode on separate GPUs"),
        ({"note": "90% reuse"}, "part of the prompts is reused"),
        ({"engine": "vllm 0.20"}, "an engine older than the tables'"),
        ({"engine": "tensorrt-llm 1.3"}, "has no rows"),
    ],
)
def test_what_is_claimed_follows_from_the_row_alone(change: dict[str, str], reason: str) -> None:
    rows = read_rows("v4_measured_serving.csv")
    long = next(r for r in rows if "TP8 EP8" in r["config"] and r["concurrency"] == "1")
    found = compare([{**long, **change}])
    assert [c.quantity for c in found] == ["ttft"]
    assert reason in found[0].reason
    assert found[0].claimed == (not reason)


def test_accelerators_by_the_names_of_tables() -> None:
    assert accelerator("b200_sxm") is accelerator("b200_sxm")
    assert accelerator("b200_sxm").name == accelerator("B200").name == "B200"
    assert link(accelerator("B200"), 8) == 9e11
    assert link(accelerator("B200"), 16) == 1e11
    assert link(accelerator("GB200"), 64) == 9e11
    with pytest.raises(ConfigError, match="Did you mean 'B200'"):
        accelerator("B2000")
