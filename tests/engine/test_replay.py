"""Window policies: what each keeps and recomputes, and that only the one named approximate changes an answer."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.assembly import Outcome, Shape, answer, cold_outcomes, model_engine, prompt_of
from thalweg.cache.policy import WindowPolicy, exact_replay_tokens
from thalweg.config.model_parse import parse_model_config
from thalweg.types import MissReason, TokenEvent

UNIT = 128


def logprobs(outcome: Outcome) -> list[float]:
    return [t.logprob or 0.0 for e in outcome.events if isinstance(e, TokenEvent) for t in e.tokens]


@pytest.mark.parametrize(("policy", "step_tokens"), [(WindowPolicy.EXACT_REPLAY, 100), (WindowPolicy.BOUNDARY, 1024)])
def test_a_replay_rebuilds_exactly_what_a_cold_run_has(fields: dict, policy: WindowPolicy, step_tokens: int) -> None:
    """Prompts that branch off where no checkpoint is: rows are reused, window x layers tokens are computed again."""
    replay = exact_replay_tokens(parse_model_config(fields))
    base = prompt_of(7, 11 * UNIT + 50)
    cuts = [cut for cut in (replay // UNIT, replay // UNIT + 1, 8, 11) if cut * UNIT > 0]
    prompts = [base[: UNIT * n + 5] + prompt_of(60 + n, 70) for n in cuts] + [base]
    expected = cold_outcomes(fields, prompts, logprobs=0)
    for number, (prompt, cold) in enumerate(zip(prompts, expected, strict=True)):
        engine = model_engine(fields, Shape(max_step_tokens=step_tokens, checkpoint_interval=0, policy=policy))
        answer(engine, "base", base)
        warm = answer(engine, "warm", prompt, logprobs=0)
        again = answer(engine, "again", prompt, logprobs=0)
        engine.close()
        report = warm.last.usage.cache
        known = (len(prompt) - 1) // UNIT if prompt == base else cuts[number]
        if policy is WindowPolicy.BOUNDARY and known == 11:  # the end of the base prompt has a checkpoint
            assert (report.cached_tokens, report.replayed_tokens) == (known * UNIT, 0)
        elif known * UNIT > replay:
            assert (report.cached_tokens, report.replayed_tokens) == (known * UNIT - replay, replay)
        else:
            assert (report.cached_tokens, report.replayed_tokens) == (0, 0)
        for outcome in (warm, again):
            assert outcome.tokens == cold.tokens
            assert np.allclose(logprobs(outcome), logprobs(cold), atol=2e-4)
            assert outcome.last.usage.cache.approximation is None


def test_a_replayed_branch_is_kept_for_the_next_one(fields: dict) -> None:
    """Under the default policy a replay ends with a checkpoint: the next branch there computes only its own tokens."""
    replay = exact_replay_tokens(parse_model_config(fields))
    base = prompt_of(7, 10 * UNIT + 50)
    engine = model_engine(fields, Shape(checkpoint_interval=0))
    answer(engine, "base", base)
    reports = [answer(engine, f"{i}", base[: 8 * UNIT + 9] + prompt_of(i, 60)).last.usage.cache for i in range(2)]
    engine.close()
    assert (reports[0].cached_tokens, reports[0].replayed_tokens) == (8 * UNIT - replay, replay)
    assert reports[0].reason is MissReason.NO_CHECKPOINT
    assert (reports[1].cached_tokens, reports[1].replayed_tokens) == (8 * UNIT, 0)
    assert reports[1].reason is MissReason.NONE


def test_policies_keep_what_they_say(fields: dict) -> None:
    base, made = prompt_of(3, 6 * UNIT + 10), {}
    for policy, interval in (
        (WindowPolicy.FULL, 0),
        (WindowPolicy.INTERVAL, 3 * UNIT),
        (WindowPolicy.EXACT_REPLAY, 0),
        (WindowPolicy.BOUNDED_REPLAY, 0),
    ):
        engine = model_engine(fields, Shape(policy=policy, checkpoint_interval=interval, replay=False))
        answer(engine, "base", base)
        made[policy] = sum(n.checkpoint is not None for n in engine._scheduler.coordinator.index.units())
        engine.close()
    assert list(made.values()) == [6, 2, 0, 0]


def test_bounded_replay_is_named_and_stays_apart(fields: dict) -> None:
    base = prompt_of(7, 9 * UNIT + 50)
    engine = model_engine(fields, Shape(policy=WindowPolicy.BOUNDED_REPLAY))
    first, second = (answer(engine, name, base) for name in ("first", "second"))
    engine.close()
    assert first.last.usage.cache.approximation is None
    report = second.last.usage.cache
    assert (report.cached_tokens, report.replayed_tokens) == (8 * UNIT, UNIT)
    assert report.approximation == "bounded-replay"


def test_a_request_that_gives_way_in_the_middle_of_a_replay(fields: dict) -> None:
    """Cancelled and asked again after some of the replay: nothing wrong was published on the way."""
    base = prompt_of(7, 11 * UNIT + 50)
    prompt = base[: 9 * UNIT + 3] + prompt_of(1, 300)
    (expected,) = cold_outcomes(fields, [prompt], logprobs=0)
    engine = model_engine(fields, Shape(max_step_tokens=40, checkpoint_interval=0))
    answer(engine, "base", base)
    for attempt in range(3):
        from tests.engine.assembly import submit

        outcome = submit(engine, f"try {attempt}", prompt)
        assert outcome.started.wait(60)
        engine.cancel(f"try {attempt}")
        assert outcome.done.wait(60)
    warm = answer(engine, "warm", prompt, logprobs=0)
    engine._scheduler.coordinator.check()
    engine.close()
    assert warm.tokens == expected.tokens
    assert np.allclose(logprobs(warm), logprobs(expected), atol=2e-4)
