"""A step of a whole model: sums of parts, what grows with what, and the fast path beside the exact one."""

from __future__ import annotations

import random

import pytest

from thalweg.config.model_parse import default_model, load_model_config
from thalweg.errors import ConfigError
from thalweg.planner.cost import Origin, SequenceWork, StepWork
from thalweg.planner.layout import Deployment, ParallelLayout, Speculation
from thalweg.planner.step_cost import ModelStepCost

FLASH, PRO = load_model_config("flash"), load_model_config("pro")
TP8 = ParallelLayout(8, expert_parallel=True)


def cost(
    framework: str = "vllm", layout: ParallelLayout = TP8, speculation: Speculation | None = None
) -> ModelStepCost:
    return ModelStepCost(FLASH, Deployment(framework, "B200", layout, speculation=speculation))


def test_works_are_grouped() -> None:
    work = StepWork.of(
        [
            SequenceWork(8192, 0, False),
            SequenceWork(1, 5000, True),
            SequenceWork(4, 9000, True),
            SequenceWork(12, 0, True),
        ]
    )
    assert work == StepWork(((8192, 0), (12, 0)), 2, 5, 14000, 9000, 3)
    assert work.tokens == 8192 + 12 + 5


def test_nothing_costs_nothing() -> None:
    assert cost().seconds(StepWork()) == 0.0
    assert cost().estimate(StepWork()).seconds == 0.0


def test_seconds_are_within_three_percent_of_the_estimate() -> None:
    price, draw = cost(), random.Random(0)
    for _ in range(60):
        contexts = [draw.randint(1000, 500_000)] * draw.choice([0, 1, 8, 50])
        chunks = tuple(
            (draw.choice([8192, draw.randint(600, 8191)]), draw.randint(0, 900_000))
            for _ in range(draw.choice([0, 1, 2]))
        )
        count = len(contexts)
        work = StepWork(chunks, count, count, sum(contexts), max(contexts, default=0), count)
        assert price.seconds(work) == pytest.approx(price.estimate(work).seconds, rel=0.03)


@pytest.mark.parametrize("framework", ["sglang", "vllm"])
def test_a_chunk_grows_with_context_and_a_decode_with_batch(framework: str) -> None:
    price = cost(framework)
    depths = [price.estimate(StepWork.prefill(8192, 32768 * 2**i)).seconds for i in range(6)]
    assert depths == sorted(depths)
    batches = [price.estimate(StepWork.decode(2**i, 200_000)).seconds for i in range(7)]
    assert batches == sorted(batches)


def test_a_mixed_step_costs_less_than_its_parts_apart_and_more_than_either() -> None:
    price = cost()
    chunk, decode = StepWork.prefill(4096, 100_000), StepWork.decode(16, 100_000)
    mixed = StepWork(chunk.chunks, 16, 16, 1_600_000, 100_000, 16)
    apart = [price.estimate(w).seconds for w in (chunk, decode)]
    assert max(apart) < price.estimate(mixed).seconds < sum(apart)


def test_many_small_chunks_launch_once() -> None:
    price = cost()
    one, many = StepWork.prefill(32, 1000), StepWork(((32, 1000),) * 40)
    together = price.estimate(many)
    assert price.estimate(one).seconds < together.seconds < 40 * price.estimate(one).seconds
    assert 0 < together.low < together.seconds < together.high


def test_parts_name_what_costs_and_sum_to_the_step() -> None:
    parts = cost().parts(StepWork.prefill(8192, 900_000))
    whole = cost().estimate(StepWork.prefill(8192, 900_000)).seconds
    assert sum(p.seconds for p in parts.values()) == pytest.approx(whole)
    attention = sum(p.seconds for name, p in parts.items() if name.startswith("attention"))
    assert attention > 0.85 * whole  # a long prefill is attention
    per_layer = {
        kind: parts[f"attention {kind}"].seconds / FLASH.layer_kinds.count(kind) for kind in ("window", "csa", "hca")
    }
    assert per_layer["window"] < 0.2 * per_layer["hca"] < per_layer["csa"]


def test_tensor_parallelism_does_not_speed_up_a_long_prefill_but_context_parallelism_does() -> None:
    """Profiling note 5: a CSA layer's 8K chunk at 1M takes 31.1 ms on one rank, 30.3 ms on each of eight."""
    long = StepWork.prefill(8192, 1_000_000)
    one, eight = (cost("sglang", ParallelLayout(tp)).parts(long)["attention csa"].seconds for tp in (1, 8))
    assert one / eight == pytest.approx(31.08 / 30.26, rel=0.03)
    split = cost("sglang", ParallelLayout(1, 1, 8)).parts(long)["attention csa"].seconds
    assert split < 0.2 * one


def test_speculation_prices_what_is_verified_and_the_drafts() -> None:
    plain, drafting = cost(), cost(speculation=Speculation(3, 2.5))
    one, four = plain.estimate(StepWork.decode(8, 8192)), drafting.estimate(StepWork.decode(8, 8192, 4))
    assert one.seconds < four.seconds < 4 * one.seconds
    assert "drafts" in drafting.parts(StepWork.decode(8, 8192, 4))


def test_any_model_is_priced() -> None:
    tiny = load_model_config(default_model())
    price = ModelStepCost(tiny, Deployment("vllm", "H200", ParallelLayout(), "bf16"))
    estimate = price.estimate(StepWork.decode(4, 10_000))
    assert 0 < estimate.seconds < 0.1
    assert estimate.origin in (Origin.EXTRAPOLATED, Origin.BOUND)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: ParallelLayout(3), "tp: 3 is no power of two"),
        (lambda: ParallelLayout(exchange="deepep"), "Did you mean 'deepep_ll'"),
        (lambda: Deployment("vllm", "B200", TP8, "mxfp"), "Did you mean 'mxfp4'"),
        (lambda: Speculation(3, 5.0), "accepted: 5.0"),
        (lambda: ModelStepCost(FLASH, Deployment("vllm", "B100", TP8)), "hardware: 'B100'"),
        (lambda: ModelStepCost(PRO, Deployment("vllm", "B200", ParallelLayout(256))), "tp: 256 does not divide"),
    ],
)
def test_what_cannot_be_is_refused(wrong, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        wrong()
