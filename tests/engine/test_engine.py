"""The engine's promises to its callers: one terminal event each, failures stay with their request, limits are named."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tests.engine.assembly import CountingRunner, Models, Outcome, Shape, answer, engine_of, model_engine, submit
from tests.model.fields import FLASH_LIKE, NARROW
from thalweg.engine.engine import CRASH_SECONDS, MOST_CRASHES, Engine
from thalweg.engine.plan import StepPlan
from thalweg.engine.scheduler import Scheduler
from thalweg.engine.tiering import Tiering
from thalweg.errors import ContextLengthError, EngineError, OverloadedError, RequestError, UnavailableError
from thalweg.types import GenerateRequest, SamplingParams, TokenEvent

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


def broken_commits(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException, times: int) -> None:
    """The next steps are computed and cannot be committed, by this scheduler or those after it."""
    left = [times]
    commit = Scheduler.commit

    def failing(scheduler: Scheduler, plan: StepPlan) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        commit(scheduler, plan)

    monkeypatch.setattr(Scheduler, "commit", failing)


def patient(engine: Engine, name: str) -> Outcome:
    """An answer, once the engine is there again."""
    while True:
        try:
            return answer(engine, name, [5] * 10)
        except UnavailableError:
            time.sleep(0.005)


@pytest.mark.parametrize("error", [RuntimeError("lost count"), SystemExit(3)])
def test_a_crash_answers_everybody_and_starts_anew(
    engine: Engine, runner: CountingRunner, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    answer(engine, "before", [5] * 300)
    runner.gate.clear()
    outcomes = [submit(engine, str(i), [5] * 300, max_tokens=2 + i) for i in range(5)]
    broken_commits(engine, monkeypatch, error, 1)
    runner.gate.set()
    assert all(o.done.wait(30) for o in outcomes)
    assert all(isinstance(o.last.error, UnavailableError) and o.last.error.retryable for o in outcomes)
    assert patient(engine, "after").last.finish == "length"
    assert answer(engine, "again", [5] * 300).last.usage.cached_tokens == 0, "the prefix index went, too"
    status = engine.status()
    assert (status.healthy, status.failure, status.counters["restarts"]) == (True, None, 1)
    assert idle(engine)


def test_while_it_restarts_it_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is taken in, and what was asked of its cache is done by the new one."""
    begun, go_on = threading.Event(), threading.Event()

    def abandon(_: Tiering) -> None:
        begun.set()
        assert go_on.wait(30)

    monkeypatch.setattr(Tiering, "abandon", abandon)
    broken_commits(engine, monkeypatch, RuntimeError("lost count"), 1)
    assert answer(engine, "a", [5] * 10).last.error is not None
    assert begun.wait(30)
    status = engine.status()
    assert not status.healthy and "restarts" in (status.failure or "") and status.running == 0
    with pytest.raises(UnavailableError, match="restarts"):
        submit(engine, "b", [5] * 10)
    with pytest.raises(UnavailableError, match="restarts"):
        engine.reset_prefix_cache()
    go_on.set()
    assert patient(engine, "c").last.finish == "length"
    assert "the engine crashed and restarts: RuntimeError('lost count')" in caplog.text


@pytest.mark.parametrize("seconds", [0.0, CRASH_SECONDS])
def test_crashes_in_quick_succession_end_it_for_good(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = [0.0]
    engine = engine_of(FLASH_LIKE, CountingRunner(), PLAN, Shape(), clock=lambda: now[0])
    broken_commits(engine, monkeypatch, RuntimeError("lost count"), MOST_CRASHES)
    for number in range(MOST_CRASHES):
        assert isinstance(patient(engine, str(number)).last.error, UnavailableError)
        now[0] += seconds
    engine._thread.join(0.0 if seconds else 30)
    assert engine._thread.is_alive() == (seconds > 0)
    if seconds:
        assert patient(engine, "after").last.finish == "length"
    else:
        for ask in (lambda: submit(engine, "late", [5]), engine.reset_prefix_cache):
            with pytest.raises(UnavailableError, match="stopped working: RuntimeError"):
                ask()
        assert not engine.status().healthy and engine.status().counters["restarts"] == MOST_CRASHES - 1
    engine.close()


def test_an_engine_that_cannot_be_rebuilt_stays_down(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def abandon(_: Tiering) -> None:
        raise OSError("no way back")

    monkeypatch.setattr(Tiering, "abandon", abandon)
    broken_commits(engine, monkeypatch, RuntimeError("lost count"), 1)
    assert isinstance(answer(engine, "a", [5]).last.error, UnavailableError)
    engine._thread.join(30)
    with pytest.raises(UnavailableError, match="no way back"):
        submit(engine, "b", [5])


def test_a_reset_that_fails_is_no_silence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Tiering, "reset", lambda *_: 1 / 0)
        with pytest.raises(UnavailableError, match="crashed"):
            engine.reset_prefix_cache()
    deadline = time.monotonic() + 30
    while patient(engine, "after").last.error is not None:  # taken in just before the crash
        assert time.monotonic() < deadline
    assert engine.status().counters["restarts"] == 1


class BadRules:
    """Rules of an output with a bug in one of their two methods."""

    def __init__(self, where: str) -> None:
        self._where = where

    def start(self) -> BadRules:
        return self

    def allowed(self, output: object) -> None:
        assert self._where != "allowed", "a bug in the rules"

    def ends_with(self, token: int) -> bool:
        assert self._where != "ends_with", "a bug in the rules"
        return False


@pytest.mark.parametrize("where", ["allowed", "ends_with"])
def test_bad_rules_end_their_own_request(where: str) -> None:
    engine = model_engine(NARROW, Shape())
    alone = answer(engine, "alone", [7] * 200).tokens
    outcomes = [submit(engine, str(i), [7] * 200, rules=BadRules(where) if i == 1 else None) for i in range(3)]
    assert all(o.done.wait(60) for o in outcomes)
    assert isinstance(outcomes[1].last.error, EngineError) and "a bug in the rules" in str(outcomes[1].last.error)
    assert outcomes[0].tokens == outcomes[2].tokens == alone
    assert idle(engine) and engine.status().counters["failed_steps"] == engine.status().counters["restarts"] == 0
    engine.close()


def test_a_listener_that_raises_ends_its_own_request(engine: Engine) -> None:
    heard = []

    def broken(event: object) -> None:
        heard.append(event)
        raise SystemExit("broken listener")

    engine.submit(GenerateRequest("a", np.array([1, 2], np.int32), SamplingParams(max_tokens=1000)), broken)
    assert answer(engine, "b", [5] * 10, max_tokens=30).last.finish == "length"
    assert len(heard) < 30 and heard[-1].finish == "cancelled"
    assert idle(engine)
