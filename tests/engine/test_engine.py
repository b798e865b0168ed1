"""The engine's promises to its callers: one terminal event each, failures stay with their request, limits are named."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.engine.assembly import CountingRunner, Models, Outcome, Shape, answer, engine_of, submit
from tests.model.fields import FLASH_LIKE
from thalweg.engine.engine import Engine
from thalweg.engine.request import Sequence
from thalweg.engine.shadow import Shadow
from thalweg.errors import ContextLengthError, OverloadedError, RequestError, UnavailableError
from thalweg.types import FinishReason, GenerateRequest, SamplingParams, TokenEvent

_, PLAN = Models().runner(FLASH_LIKE, Shape())


@pytest.fixture
def runner() -> CountingRunner:
    return CountingRunner()


@pytest.fixture
def engine(runner: CountingRunner):
    engine = engine_of(FLASH_LIKE, runner, PLAN, Shape(max_step_tokens=64, max_running=3))
    yield engine
    runner.gate.set()
    engine.close()


def idle(engine: Engine) -> bool:
    """Nothing is held: every block is free or only cached."""
    status = engine.status()
    held = [g.total_blocks - g.free_blocks - g.idle_blocks for g in status.groups]
    return status.running == status.waiting == 0 and not any(held)


def test_output_ends_at_the_limit_with_progress_on_the_way(engine: Engine) -> None:
    outcome = answer(engine, "a", [5] * 200, max_tokens=3)
    assert outcome.progress == [64, 128, 192]
    assert outcome.tokens == [2 + n % 88 for n in (200, 201, 202)]
    assert outcome.last.finish == "length"
    assert (outcome.last.usage.prompt_tokens, outcome.last.usage.output_tokens) == (200, 3)


def test_stop_token_and_eos_and_min_tokens(engine: Engine) -> None:
    assert answer(engine, "a", [5] * 10, stop_token_ids=(2 + 12,)).tokens == [12, 13, 14]
    at_eos = [5] * 87  # the counting runner says 1 + 88 = EOS + 88 never; a stop id stands for it
    kept = answer(engine, "b", at_eos, stop_token_ids=(2 + 87,), min_tokens=4, max_tokens=6)
    assert len(kept.tokens) == 6


def test_exactly_one_terminal_event_whatever_happens(engine: Engine, runner: CountingRunner) -> None:
    runner.fail_at = {4, 9}
    outcomes = [submit(engine, str(i), [5] * (50 * i + 1), max_tokens=5) for i in range(8)]
    for i in (1, 6):
        engine.cancel(str(i))
    engine.cancel("unknown")
    assert all(o.done.wait(30) for o in outcomes)
    for outcome in outcomes:
        terminal = [e for e in outcome.events if isinstance(e, TokenEvent) and e.finish]
        assert len(terminal) == 1 and outcome.events[-1] is terminal[0]
    reasons = {o.last.finish.value for o in outcomes}
    assert "error" in reasons and "length" in reasons
    assert idle(engine)


def test_a_failing_step_fails_only_its_requests(engine: Engine, runner: CountingRunner) -> None:
    runner.fail_at = {1}
    failed = answer(engine, "a", [5] * 10)
    assert failed.last.finish == "error" and "injected failure" in str(failed.last.error)
    assert answer(engine, "b", [5] * 10).last.finish == "length"


def test_a_listener_that_raises_harms_nobody(engine: Engine) -> None:
    def broken(_: object) -> None:
        raise ValueError("broken listener")

    engine.submit(GenerateRequest("a", np.array([1, 2], np.int32), SamplingParams(max_tokens=2)), broken)
    assert answer(engine, "b", [5] * 10).last.finish == "length"


def test_cancel_frees_everything_within_one_step(engine: Engine, runner: CountingRunner) -> None:
    outcome = submit(engine, "a", [5] * 1000)
    assert outcome.started.wait(30)
    engine.cancel("a")
    assert outcome.done.wait(30)
    steps = len(runner.plans)
    assert idle(engine)
    answer(engine, "b", [6] * 3, max_tokens=1)
    assert not any(name == "a" for plan in runner.plans[steps:] for name, *_ in plan)


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "param", "words"),
    [
        ([], {}, RequestError, "prompt", "no tokens"),
        ([3, 97], {}, RequestError, "prompt", "0 to 96"),
        ([-1], {}, RequestError, "prompt", "0 to 96"),
        ([3] * 10, {"max_tokens": 2**20}, ContextLengthError, "max_tokens", "10 prompt tokens"),
    ],
)
def test_bad_requests_are_refused_by_name(engine: Engine, prompt, sampling, error, param, words) -> None:
    with pytest.raises(error, match=words) as caught:
        submit(engine, "a", prompt, **sampling)
    assert caught.value.param == param
    assert answer(engine, "a", [5]).last.finish == "length"


def test_too_long_a_prompt_names_the_limit(engine: Engine) -> None:
    limit = engine.limits.token_capacity
    with pytest.raises(ContextLengthError, match=str(limit)):
        submit(engine, "a", [5] * limit, max_tokens=None)


def test_duplicate_ids_overload_and_shutdown(engine: Engine, runner: CountingRunner) -> None:
    runner.gate.clear()
    outcomes = [submit(engine, str(i), [5]) for i in range(64)]
    with pytest.raises(OverloadedError, match="64"):
        submit(engine, "one more", [5])
    runner.gate.set()
    assert all(o.done.wait(30) for o in outcomes)
    runner.gate.clear()
    waiting = submit(engine, "x", [5])
    with pytest.raises(RequestError, match="in use"):
        submit(engine, "x", [5])
    closer = threading.Thread(target=engine.close)
    closer.start()
    runner.gate.set()
    closer.join(30)
    assert waiting.done.wait(30)
    with pytest.raises(UnavailableError):
        submit(engine, "late", [5])


def test_reset_reports_what_it_forgot(engine: Engine) -> None:
    answer(engine, "a", [5] * 300)
    assert engine.reset_prefix_cache() == 256
    assert answer(engine, "b", [5] * 300).last.usage.cached_tokens == 0


def test_reset_of_other_tiers_leaves_the_device(engine: Engine) -> None:
    answer(engine, "a", [5] * 300)
    assert engine.reset_prefix_cache(frozenset({"host", "disk"})) == 0
    assert answer(engine, "b", [5] * 300).last.usage.cached_tokens == 256
    assert engine.reset_prefix_cache(frozenset({"device"})) == 256


def test_status_counts(engine: Engine, runner: CountingRunner) -> None:
    runner.gate.clear()
    outcomes: list[Outcome] = [submit(engine, str(i), [5] * 10) for i in range(5)]
    runner.gate.set()
    assert all(o.done.wait(30) for o in outcomes)
    counters = engine.status().counters
    assert counters["finished_length"] == 5
    assert counters["step_tokens"] == 5 * 10 + 5 * 7


def test_an_engine_that_cannot_go_on_tells_everybody() -> None:
    class Broken(Shadow):
        def consider(self, sequence: Sequence, finish: FinishReason) -> None:
            raise RuntimeError("forgot how to end")

    engine = engine_of(FLASH_LIKE, CountingRunner(), PLAN, Shape(), shadow=Broken(0.0, lambda: 1.0))
    outcomes = [submit(engine, str(i), [5] * 10, max_tokens=2 + i) for i in range(4)]
    assert all(o.done.wait(30) for o in outcomes)
    assert {o.last.finish.value for o in outcomes} == {"error"}
    assert all(sum(isinstance(e, TokenEvent) and e.finish is not None for e in o.events) == 1 for o in outcomes)
    engine.close()
    assert engine.status().healthy is False and "forgot how" in (engine.status().failure or "")
    with pytest.raises(UnavailableError):
        submit(engine, "late", [5])
