"""Deterministic mode: the logits of a request are the same bits, however it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.engine.assembly import MODELS, RecordingSampler, Shape, answer, engine_of, prompt_of, submit
from tests.model.fields import GEOMETRIES
from thalweg.engine.engine import Engine

EVERY_LENGTH = (*range(1, 6), *range(123, 134), *range(251, 262), *range(508, 517))
LENGTHS = (1, 4, 5, 127, 128, 129, 251, 256, 257, 511, 516)
BUDGETS = (16, 129, 1024)

Rows = dict[int, torch.Tensor]


@pytest.fixture
def one() -> dict:
    """A geometry for what does not depend on it."""
    return GEOMETRIES["flash-like"]


@contextmanager
def running(fields: dict, **shape: object) -> Iterator[tuple[Engine, dict[str, Rows]]]:
    """A deterministic engine and the logits that it computes, by request."""
    layout = Shape(**{"deterministic": True, **shape})  # type: ignore[arg-type]
    sampler = RecordingSampler()
    runner, plan = MODELS.runner(fields, layout, sampler)
    engine = engine_of(fields, runner, plan, layout)
    yield engine, sampler.rows
    engine.close()


def cold(fields: dict, prompts: list[list[int]], kernels: str = "auto", **sampling: int) -> list[Rows]:
    """Each prompt alone, in one chunk, without any cache."""
    with running(fields, max_step_tokens=1024, prefix_caching=False, kernels=kernels) as (engine, rows):
        for i, prompt in enumerate(prompts):
            answer(engine, str(i), prompt, **sampling)
    return [rows[str(i)] for i in range(len(prompts))]


def assert_same_bits(ours: Rows, expected: Rows) -> None:
    assert ours.keys() == expected.keys()
    for tokens, row in ours.items():
        assert torch.equal(row, expected[tokens]), f"the logits after {tokens} tokens differ"


def check_company(fields: dict, lengths: tuple[int, ...], budget: int, kernels: str = "auto") -> None:
    """Chunked, batched, beside requests that are cancelled, and once more from the prefix cache."""
    prompts = [prompt_of(i, length) for i, length in enumerate(lengths)]
    expected = cold(fields, prompts, kernels, max_tokens=3)
    with running(fields, max_step_tokens=budget, kernels=kernels) as (engine, rows):
        outcomes = [submit(engine, f"{i}", prompt, max_tokens=3) for i, prompt in enumerate(prompts)]
        doomed = [submit(engine, f"doomed {i}", prompt_of(50 + i, 200), max_tokens=99) for i in range(3)]
        assert doomed[0].started.wait(60)
        for i in range(3):
            engine.cancel(f"doomed {i}")
        assert all(outcome.done.wait(120) for outcome in [*outcomes, *doomed])
        again = [submit(engine, f"again {i}", prompt, max_tokens=3) for i, prompt in enumerate(prompts)]
        assert all(outcome.done.wait(120) for outcome in again)
    for i, (prompt, outcome) in enumerate(zip(prompts, again, strict=True)):
        assert_same_bits(rows[f"{i}"], expected[i])
        assert_same_bits(rows[f"again {i}"], expected[i])
        assert outcome.last.usage.cached_tokens == (len(prompt) - 1) // 128 * 128


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(("geometry", "budget"), [("narrow", 16), ("flash-like", 129), ("pro-like", 1024)])
def test_company_chunks_and_the_cache_do_not_matter(geometry: str, budget: int, kernels: str) -> None:
    check_company(GEOMETRIES[geometry], LENGTHS[::2] if budget == 16 else LENGTHS, budget, kernels)


@pytest.mark.stress
@pytest.mark.parametrize("budget", BUDGETS)
def test_company_does_not_matter_at_any_length(fields: dict, budget: int) -> None:
    check_company(fields, EVERY_LENGTH, budget)


def test_the_reference_kernels_would_fail_this() -> None:
    """If they did not, these tests would show nothing."""
    fields = GEOMETRIES["flash-like"]
    prompt = prompt_of(3, 300)
    rows = []
    for budget in (16, 1024):
        with running(fields, max_step_tokens=budget, deterministic=False, kernels="reference") as (engine, recorded):
            answer(engine, "a", prompt)
        rows.append(recorded["a"][300])
    assert torch.allclose(rows[0], rows[1], atol=1e-3) and not torch.equal(rows[0], rows[1])


def test_resuming_at_every_unit(fields: dict) -> None:
    prefix = prompt_of(7, 5 * 128)
    prompts = [prefix[: 128 * n] + prompt_of(60 + n, 37) for n in range(6)]
    expected = cold(fields, prompts)
    with running(fields, max_step_tokens=200, checkpoint_interval=128) as (engine, rows):
        answer(engine, "prefix", prefix)
        cached = [answer(engine, str(n), p).last.usage.cached_tokens for n, p in enumerate(prompts)]
    assert cached == [128 * n for n in range(6)]
    for n, wanted in enumerate(expected):
        assert_same_bits(rows[str(n)], wanted)


def test_decoding_equals_reading(one: dict) -> None:
    """A token that was generated has the logits that it has as the end of a prompt."""
    prompt = prompt_of(1, 250)
    with running(one) as (engine, rows):
        said = answer(engine, "said", prompt, max_tokens=12).tokens
    prompts = [[*prompt, *said[:n]] for n in range(12)]
    for n, read in enumerate(cold(one, prompts, max_tokens=1)):
        assert torch.equal(read[250 + n], rows["said"][250 + n])


def test_preemption(one: dict) -> None:
    prompts = [prompt_of(i, 250) for i in range(3)]
    shape = Shape(max_running=3, deterministic=True)
    sampler = RecordingSampler()
    runner, plan = MODELS.runner(one, shape, sampler)
    small = {spec.group: (8 if spec.compressed else plan.pool_blocks[spec.group]) for spec in plan.groups}
    engine = engine_of(one, runner, type(plan)(plan.groups, plan.layout, small, 3), shape)
    outcomes = [submit(engine, str(i), prompt, max_tokens=16) for i, prompt in enumerate(prompts)]
    assert all(o.done.wait(120) for o in outcomes)
    engine.close()
    assert sum(o.last.usage.preemptions for o in outcomes) > 0
    for i, expected in enumerate(cold(one, prompts, max_tokens=16)):
        assert_same_bits(sampler.rows[str(i)], expected)


def test_logprobs_are_the_same_bits(one: dict) -> None:
    prompts = [prompt_of(i, length) for i, length in enumerate((5, 130, 257))]
    values = []
    for budget, together in ((1024, False), (129, True)):
        with running(one, max_step_tokens=budget, prefix_caching=False) as (engine, _):
            outcomes = []
            for i, prompt in enumerate(prompts):
                outcomes.append(submit(engine, str(i), prompt, logprobs=20, temperature=0.8, seed=5, top_p=0.9))
                assert together or outcomes[-1].done.wait(60)
            assert all(o.done.wait(60) for o in outcomes)
        values.append([[t for e in o.events if hasattr(e, "tokens") for t in e.tokens] for o in outcomes])
    assert values[0] == values[1]


def test_with_quantized_storage(fields: dict) -> None:
    """Rounding makes jumps of last bits: here they must be equal before it."""
    prompts = [prompt_of(9, 520), prompt_of(10, 131)]
    layout = {"simulate_quantization": True}
    with running(fields, max_step_tokens=1024, prefix_caching=False, **layout) as (engine, expected):
        for i, prompt in enumerate(prompts):
            answer(engine, str(i), prompt)
    with running(fields, max_step_tokens=100, **layout) as (engine, rows):
        outcomes = [submit(engine, str(i), prompt) for i, prompt in enumerate(prompts)]
        assert all(o.done.wait(60) for o in outcomes)
    for i in range(2):
        assert_same_bits(rows[str(i)], expected[str(i)])
