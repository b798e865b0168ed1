"""Faults in every call that a workload makes: of the runner, the tiers, and the state that an engine restarts for.

The methods are those that the classes have, so that a new one is tested too. After each fault every request has had
exactly one terminal event, answers are those of a cold run, no block is lost, and the next request is answered right.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.assembly import Outcome, Shape, answer, cold_outcomes, model_engine, prompt_of, submit
from tests.model.fields import GEOMETRIES
from thalweg.cache.coordinator import Coordinator
from thalweg.engine.engine import Engine
from thalweg.engine.plan import StepResult
from thalweg.engine.scheduler import Scheduler
from thalweg.engine.shadow import Shadow
from thalweg.engine.tiering import REFUSED_SECONDS, Tiering
from thalweg.errors import CancelledError, EngineError, UnavailableError
from thalweg.memory.disk import DiskTier
from thalweg.memory.files import Files
from thalweg.memory.host import HostTier
from thalweg.memory.jobs import Mover
from thalweg.memory.tier import Found, Tier
from thalweg.types import SampledToken, TokenEvent

FIELDS = GEOMETRIES["narrow"]
UNIT = 128
SPACE = 64 << 20
PROMPTS = [prompt_of(seed, 3 * UNIT + 20) for seed in range(3)]
GROWING = [prompt_of(10 + seed, UNIT + 120) for seed in range(2)]
GROWTH = 16  # tokens, past the end of a unit: both requests together then need more than the pools have


def methods_of(kind: type) -> list[str]:
    """What a class offers."""
    return [name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")]


class Fault:
    """Makes calls of one method go wrong: those for which `when` says so by their number, counted from 0."""

    def __init__(self, when: Callable[[int], bool], how: str, error: BaseException | None = None) -> None:
        self.calls = self.fired = 0
        self._when = when
        self._how = how
        self._error = error or RuntimeError("injected failure")

    def stop(self) -> None:
        """Nothing goes wrong any more."""
        self._when = lambda _: False

    def wrap(self, owner: Any, name: str) -> None:
        """Replace a method of one object."""
        real = getattr(owner, name)

        def method(*arguments: Any, **named: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if not self._when(number):
                return real(*arguments, **named)
            self.fired += 1
            if self._how == "before":
                raise self._error
            answer = real(*arguments, **named)
            if self._how == "after":
                raise self._error
            return spoiled(answer)

        setattr(owner, name, method)


def spoiled(answer: Any) -> Any:
    """Another answer than the right one."""
    if isinstance(answer, Found):
        return replace(answer, units=answer.units + 1, checkpoints=(*answer.checkpoints, answer.units + 1))
    if isinstance(answer, np.ndarray):
        return answer[:1] if len(answer) > 1 else answer[:0]
    if isinstance(answer, StepResult):
        return StepResult({name: SampledToken(-1) for name in list(answer.sampled)[:1]})
    return not answer if isinstance(answer, bool) else None


Said = list[SampledToken]


@dataclass
class Expected:
    """What each prompt is answered with, without any cache or fault."""

    prompts: list[Said]
    growing: list[Said]


@pytest.fixture(scope="module")
def expected() -> Expected:
    prompts = cold_outcomes(FIELDS, PROMPTS, max_tokens=4, logprobs=0)
    growing = cold_outcomes(FIELDS, GROWING, max_tokens=GROWTH, logprobs=0)
    return Expected([said(outcome) for outcome in prompts], [said(outcome) for outcome in growing])


def said(outcome: Outcome) -> Said:
    return [token for event in outcome.events if isinstance(event, TokenEvent) for token in event.tokens]


def same(one: Said, other: Said) -> bool:
    """The same tokens by nearly the same logits: a few tokens alone may be the same by chance."""
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) and all(
        a.token == b.token and abs((a.logprob or 0) - (b.logprob or 0)) < 1e-4 for a, b in pairs
    )


@dataclass
class Rig:
    """An engine over small pools with both tiers, and everything that was asked of it."""

    engine: Engine
    expected: Expected
    ahead: list[float]  # the one number of seconds that the engine's clock is ahead
    asked: list[tuple[Outcome, Said]] = field(default_factory=list)

    def submit(self, prompt: int) -> Outcome:
        return self._submit(PROMPTS[prompt], self.expected.prompts[prompt], max_tokens=4)

    def answer(self, prompt: int) -> None:
        assert self.submit(prompt).done.wait(60)

    def grow(self) -> list[Outcome]:
        pairs = zip(GROWING, self.expected.growing, strict=True)
        return [self._submit(prompt, tokens, max_tokens=GROWTH) for prompt, tokens in pairs]

    def _submit(self, prompt: list[int], expected: Said, **sampling: Any) -> Outcome:
        while True:
            try:
                outcome = submit(self.engine, f"{len(self.asked)}", prompt, logprobs=0, **sampling)
            except UnavailableError:  # it is restarting
                time.sleep(0.005)
                continue
            self.asked.append((outcome, expected))
            return outcome


def workload(rig: Rig) -> Iterator[None]:
    """Copies down, evictions, loads, shadow runs, requests that give way, a cancelled load and resets, step by step."""
    for prompt in (0, 1, 2, 0):
        rig.answer(prompt)
        yield
    quiet(rig.engine)
    yield
    outcomes = rig.grow()
    yield
    assert all(outcome.done.wait(60) for outcome in outcomes)
    quiet(rig.engine)
    yield
    doomed = rig.submit(1)
    rig.engine.cancel(f"{len(rig.asked) - 1}")
    assert doomed.done.wait(60)
    rig.engine.tiers()
    yield
    forget(rig.engine, "device")
    rig.answer(2)
    yield
    forget(rig.engine, "device", "host")
    rig.answer(0)
    yield
    quiet(rig.engine)
    forget(rig.engine, "device", "host", "disk")


def forget(engine: Engine, *tiers: str) -> None:
    try:
        engine.reset_prefix_cache(frozenset(tiers))
    except UnavailableError:
        time.sleep(0.05)


def quiet(engine: Engine) -> None:
    """Wait until nothing moves any more: requests, copies, shadow runs."""
    deadline, calm = time.monotonic() + 60, 0
    while calm < 2:
        assert time.monotonic() < deadline, engine.status()
        scheduler = engine._scheduler
        tiering = scheduler.tiering
        moving = scheduler.running or scheduler.waiting or scheduler.loading or engine._shadow.waiting or engine._inbox
        moving = moving or tiering.busy or tiering._backlog or tiering._in_flight_bytes or not engine.status().healthy
        calm = 0 if moving else calm + 1
        time.sleep(0.001)


def rig_of(
    directory: Path,
    expected: Expected,
    *,
    disk: DiskTier | None = None,
    prepare: Callable[[dict[str, Tier]], None] = lambda tiers: None,
) -> Rig:
    tiers: dict[str, Tier] = {"host": HostTier(2 << 20), "disk": disk or DiskTier(directory, SPACE)}
    prepare(tiers)
    ahead = [0.0]
    engine = model_engine(
        FIELDS,
        Shape(max_running=3, cache_bytes=8_000_000),
        units=5,
        tiers=tiers,
        shadow=Shadow(1.0, lambda: 0.0),
        clock=lambda: time.monotonic() + ahead[0],
    )
    return Rig(engine, expected, ahead)


def check(rig: Rig, *, may_fail: tuple[type[Exception], ...] = ()) -> None:
    """See the module. Failed requests have an error of these kinds, and said nothing wrong before."""
    quiet(rig.engine)
    for outcome, expected in rig.asked:
        terminal = [e for e in outcome.events if isinstance(e, TokenEvent) and e.finish is not None]
        assert len(terminal) == 1 and outcome.events[-1] is terminal[0]
        if terminal[0].error is None:
            assert same(said(outcome), expected)
        else:
            assert isinstance(terminal[0].error, (CancelledError, *may_fail)), repr(terminal[0].error)
            assert same(said(outcome), expected[: len(outcome.tokens)])
    engine, coordinator = rig.engine, rig.engine._scheduler.coordinator
    coordinator.check()
    assert not any(g.total_blocks - g.free_blocks - g.idle_blocks for g in coordinator.usage())
    for prompt in (0, 1):
        outcome = answer(engine, f"next {prompt}", PROMPTS[prompt], max_tokens=4, logprobs=0)
        assert same(said(outcome), rig.expected.prompts[prompt])
    quiet(engine)
    engine.reset_prefix_cache()
    assert all(g.free_blocks == g.total_blocks for g in coordinator.usage())
    assert engine.status().counters.get("shadow_mismatches", 0) == 0
    engine.close()


def methods_and_counts(objects: dict[str, tuple[Any, list[str]]]) -> Counter[tuple[str, str]]:
    """Wrap methods of objects to count their calls, by the name of the object and of the method."""
    counts: Counter[tuple[str, str]] = Counter()
    for owner, (thing, names) in objects.items():
        for name in names:
            Fault(lambda _, key=(owner, name): bool(counts.update([key])), "before").wrap(thing, name)
    return counts


def parts_of(engine: Engine) -> dict[str, tuple[Any, list[str]]]:
    """What is made anew after a crash, with the methods that the engine thread calls."""
    scheduler = engine._scheduler
    from_outside = {"connect", "close", "abandon", "usages", "check"}
    parts = {"scheduler": (scheduler, Scheduler), "coordinator": (scheduler.coordinator, Coordinator)}
    parts |= {"tiering": (scheduler.tiering, Tiering), "mover": (scheduler.tiering._mover, Mover)}
    return {
        name: (part, [m for m in methods_of(kind) if m not in from_outside]) for name, (part, kind) in parts.items()
    }


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory, expected: Expected) -> Counter[tuple[str, str]]:
    """How often the workload calls what, where nothing goes wrong."""
    counts: list[Counter[tuple[str, str]]] = []

    def prepare(tiers: dict[str, Tier]) -> None:
        own = {"host": (tiers["host"], methods_of(HostTier)), "disk": (tiers["disk"], methods_of(Tier))}
        counts.append(methods_and_counts(own))

    rig = rig_of(tmp_path_factory.mktemp("calls"), expected, prepare=prepare)
    counts.append(methods_and_counts(parts_of(rig.engine)))
    run(rig)
    counted = counts[0] + counts[1]
    check(rig)
    counted.update({call: count for call, count in counts[0].items() if call not in counted})  # close
    return counted


def run(rig: Rig) -> None:
    for _ in workload(rig):
        pass


TIER_CALLS = [("host", name) for name in methods_of(HostTier)] + [("disk", name) for name in methods_of(Tier)]


@pytest.mark.parametrize(("tier", "name"), TIER_CALLS)
def test_a_fault_in_a_tier_is_a_miss(
    tier: str, name: str, tmp_path: Path, expected: Expected, calls: Counter[tuple[str, str]]
) -> None:
    """Calls that raise before or after their work, or answer wrongly: every other one, or all where there are few."""
    several = calls[tier, name] > 3
    for how in ("before", "after", "spoiled"):
        parity = ("before", "after").index(how) if several and how != "spoiled" else None
        fault = Fault(lambda number, parity=parity: parity is None or number % 2 == parity, how)
        rig = rig_of(tmp_path / how, expected, prepare=lambda tiers, fault=fault: fault.wrap(tiers[tier], name))
        run(rig)
        check(rig)
        assert fault.fired, how
        assert rig.engine.status().counters["restarts"] == 0


def test_fewer_rows_are_not_spread_over_more_blocks(tmp_path: Path, expected: Expected) -> None:
    """To blocks that lie side by side, as those of fresh pools do, one row could be copied many times over."""
    first = rig_of(tmp_path, expected)
    first.answer(0)
    first.engine.close()
    short = Fault(lambda _: True, "spoiled")
    rig = rig_of(tmp_path, expected, prepare=lambda tiers: short.wrap(tiers["disk"], "read_rows"))
    rig.answer(0)
    check(rig)
    assert short.fired and rig.asked[0][0].last.usage.cached_tokens == 0


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", sorted(set(methods_of(Files)) - {"listing"}))  # which only a start needs
def test_a_failing_disk_is_a_miss(name: str, code: int, tmp_path: Path, expected: Expected) -> None:
    """Every other operation of one kind fails. A descriptor is gone even so."""
    files = Files()
    disk = DiskTier(tmp_path, SPACE, files)
    fault = Fault(lambda number: number % 2 == 0, "after" if name == "close" else "before", OSError(code, "injected"))
    fault.wrap(files, name)
    rig = rig_of(tmp_path, expected, disk=disk)
    run(rig)
    check(rig)
    assert fault.fired


@pytest.mark.parametrize("how", ["before", "after", "spoiled"])
def test_a_failing_step_ends_its_own_requests(how: str, tmp_path: Path, expected: Expected) -> None:
    """Every twelfth step fails, from some first one on: whoever is not in it goes on."""
    ended, asked = 0, 0
    for first in (1, 5, 9):
        rig = rig_of(tmp_path / str(first), expected)
        fault = Fault(lambda number, first=first: number % 12 == first, how)
        fault.wrap(rig.engine._runner, "run")
        run(rig)
        fault.stop()
        check(rig, may_fail=(EngineError,))
        assert fault.fired and rig.engine.status().counters["restarts"] == 0
        ended += sum(isinstance(outcome.last.error, EngineError) for outcome, _ in rig.asked)
        asked += len(rig.asked)
    assert 0 < ended < asked / 2


BENIGN = {("mover", "take_out")}  # no room in host memory: the request computes again


@pytest.mark.parametrize("part", ["scheduler", "coordinator", "tiering", "mover"])
def test_a_crash_restarts_the_engine(
    part: str, tmp_path: Path, expected: Expected, calls: Counter[tuple[str, str]]
) -> None:
    """Each method fails once, in the middle of its calls. What is open is told to come again; then all is as before."""
    reached = [name for owner, name in calls if owner == part]
    assert len(reached) > 3
    for number, name in enumerate(reached):
        how = ("before", "after")[number % 2]
        assert crashed(part, name, calls[part, name] // 2, how, rig_of(tmp_path / name, expected)), (name, how)


def crashed(part: str, name: str, at: int, how: str, rig: Rig) -> bool:
    """Whether that call was reached, failed and was dealt with as it should be."""
    fault = Fault(lambda call: call == at, how)
    fault.wrap(parts_of(rig.engine)[part][0], name)
    run(rig)
    fault.stop()
    check(rig, may_fail=(UnavailableError,))
    assert rig.engine.status().counters["restarts"] == (fault.fired and (part, name) not in BENIGN), (name, at, how)
    return fault.fired > 0


@pytest.mark.stress
@pytest.mark.timeout(3000)
def test_a_crash_at_any_call(tmp_path: Path, expected: Expected, calls: Counter[tuple[str, str]]) -> None:
    """Before and after every call of a method that has few, and some twenty of one that has many."""
    fired, tried = 0, 0
    for (part, name), count in calls.items():
        if part in ("host", "disk"):
            continue
        for at in range(0, count, 1 + count // 20):
            for how in ("before", "after"):
                tried += 1
                fired += crashed(part, name, at, how, rig_of(tmp_path / f"{tried}", expected))
                shutil.rmtree(tmp_path / f"{tried}")
    assert fired > 0.9 * tried > 500


def test_a_disk_that_has_room_again_is_offered_what_it_refused(tmp_path: Path, expected: Expected) -> None:
    """Though host memory took it, and not before a while has passed."""
    files = Files()
    full = Fault(lambda _: True, "before", OSError(errno.ENOSPC, "No space left on device"))
    disk = DiskTier(tmp_path, SPACE, files)
    full.wrap(files, "write")
    rig = rig_of(tmp_path, expected, disk=disk)
    for stopped, seconds, kept in ((False, 0, False), (True, 0, False), (True, REFUSED_SECONDS, True)):
        if stopped:
            full.stop()
        rig.ahead[0] += seconds
        for _ in range(2):  # what became due with one request is offered with the next
            rig.answer(0)
            quiet(rig.engine)
        usage = disk.usage()
        assert (usage.rows_records > 0 and usage.checkpoint_records > 0) == kept
    assert full.fired
    check(rig)
