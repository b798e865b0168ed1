"""Hit = cold, and company does not matter: the same greedy tokens however a request is computed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.assembly import MODELS, Shape, answer, cold_answers, engine_of, model_engine, prompt_of, submit

EITHER = pytest.mark.parametrize("kernels", ["auto", "reference"])  # what is expected comes from `auto` for both
LENGTHS = (1, 5, 123, 127, 128, 129, 133, 251, 256, 257, 300, 508, 512, 516)


@EITHER
def test_same_tokens_alone_batched_chunked_cached_and_with_neighbours_cancelled(fields: dict, kernels: str) -> None:
    prompts = [prompt_of(i, length) for i, length in enumerate(LENGTHS)]
    expected = cold_answers(fields, prompts)
    for step_tokens in (16, 129, 1024):
        engine = model_engine(fields, Shape(max_step_tokens=step_tokens, kernels=kernels))
        outcomes = [submit(engine, f"{i}", prompt) for i, prompt in enumerate(prompts)]
        doomed = [submit(engine, f"doomed {i}", prompt_of(50 + i, 200), max_tokens=200) for i in range(3)]
        assert doomed[0].started.wait(60)
        for i in range(3):
            engine.cancel(f"doomed {i}")
        assert all(outcome.done.wait(60) for outcome in [*outcomes, *doomed])
        assert [o.tokens for o in outcomes] == expected
        assert [o.last.finish for o in doomed] == ["cancelled"] * 3
        again = [answer(engine, f"again {i}", prompt) for i, prompt in enumerate(prompts)]
        assert [o.tokens for o in again] == expected
        for outcome, prompt in zip(again, prompts, strict=True):
            assert outcome.last.usage.cached_tokens == (len(prompt) - 1) // 128 * 128
        engine.close()


@EITHER
def test_resuming_at_every_unit_equals_cold(fields: dict, kernels: str) -> None:
    """A shared prefix of n units, then another ending: each resume point gives what a cold run gives."""
    base = prompt_of(7, 5 * 128)
    prompts = [base[: 128 * n] + prompt_of(60 + n, 37) for n in range(6)]
    expected = cold_answers(fields, prompts)
    engine = model_engine(fields, Shape(max_step_tokens=200, checkpoint_interval=128, kernels=kernels))
    answer(engine, "base", base)
    outcomes = [answer(engine, str(n), prompt) for n, prompt in enumerate(prompts)]
    engine.close()
    assert [o.tokens for o in outcomes] == expected
    assert [o.last.usage.cached_tokens for o in outcomes] == [128 * n for n in range(6)]


def test_a_conversation_resumes_at_the_end_of_its_output(fields: dict) -> None:
    first, more = prompt_of(1, 250), prompt_of(2, 20)
    engine = model_engine(fields, Shape())
    said = answer(engine, "turn 1", first, max_tokens=140).tokens
    second = answer(engine, "turn 2", [*first, *said, *more])
    engine.close()
    assert second.last.usage.cached_tokens == (250 + 139) // 128 * 128
    assert [second.tokens] == cold_answers(fields, [[*first, *said, *more]])


def test_preemption_does_not_change_the_output(fields: dict) -> None:
    """Two requests that grow until only one fits: the later one gives way, comes back and ends the same."""
    prompts = [prompt_of(i, 200) for i in range(3)]
    tight = Shape(max_running=3, cache_bytes=1)
    _, plan = MODELS.runner(fields, Shape(max_running=3))
    least = plan.total_bytes
    runner, plan = MODELS.runner(fields, Shape(max_running=3, cache_bytes=least))
    small = {g: (8 if spec.compressed else plan.pool_blocks[g]) for spec in plan.groups for g in [spec.group]}
    plan = type(plan)(plan.groups, plan.layout, small, plan.max_running)
    engine = engine_of(fields, runner, plan, tight)
    outcomes = [submit(engine, str(i), prompt, max_tokens=70) for i, prompt in enumerate(prompts)]
    assert all(o.done.wait(120) for o in outcomes)
    preemptions = sum(o.last.usage.preemptions for o in outcomes)
    engine.close()
    free = model_engine(fields, Shape(prefix_caching=False))
    expected = [answer(free, str(i), prompt, max_tokens=70).tokens for i, prompt in enumerate(prompts)]
    free.close()
    assert preemptions > 0
    assert [o.tokens for o in outcomes] == expected


def test_a_b_a_in_a_cache_too_small_for_both(fields: dict) -> None:
    a, b = prompt_of(1, 700), prompt_of(2, 700)
    expected = cold_answers(fields, [a, b, a])
    shape = Shape(max_running=2)
    runner, plan = MODELS.runner(fields, shape)
    small = {spec.group: (7 if spec.compressed else plan.pool_blocks[spec.group]) for spec in plan.groups}
    engine = engine_of(fields, runner, type(plan)(plan.groups, plan.layout, small, 2), shape)
    outcomes = [answer(engine, f"{i}", prompt) for i, prompt in enumerate((a, b, a))]
    engine.close()
    assert [o.tokens for o in outcomes] == expected
    assert outcomes[2].last.usage.cached_tokens < 640


def test_tenants_never_share(fields: dict) -> None:
    prompt = prompt_of(5, 400)
    engine = model_engine(fields, Shape())
    outcomes = [answer(engine, f"{i}", prompt, cache_salt=salt) for i, salt in enumerate(("a", "b", "a", "b"))]
    engine.close()
    assert [o.last.usage.cached_tokens for o in outcomes] == [0, 0, 384, 384]
    assert len({tuple(o.tokens) for o in outcomes}) == 1


def test_quantization_simulation_holds_over_the_cache(fields: dict) -> None:
    """What was stored rounded reads back as it was attended: warm = cold in this mode too, and it is another mode."""
    prompt = prompt_of(9, 520)
    shape = Shape(simulate_quantization=True, max_step_tokens=100)
    engine = model_engine(fields, shape)
    outcomes = [answer(engine, f"{i}", prompt, logprobs=0) for i in range(2)]
    engine.close()
    exact = model_engine(fields, Shape(max_step_tokens=100))
    plain = answer(exact, "plain", prompt, logprobs=0)
    exact.close()
    assert outcomes[0].tokens == outcomes[1].tokens
    values = [[t.logprob for e in o.events if hasattr(e, "tokens") for t in e.tokens] for o in (*outcomes, plain)]
    assert np.allclose(values[0], values[1], atol=1e-3)
    assert not np.allclose(values[0][:1], values[2][:1], atol=1e-4)
