"""Who waits for whom, on a virtual clock: steps cost what their tokens cost, and nothing is measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_scheduler import add, make
from thalweg.engine.pace import QUANTUM, Pace
from thalweg.engine.plan import StepPlan
from thalweg.engine.request import Sequence

BUDGET = 128
STEP, DECODES, TOKEN = 0.5e-3, 3e-3, 0.1e-3  # seconds: of a step, of all decodes in it, of a prompt token


def seconds_of(plan: StepPlan) -> float:
    prompt = plan.tokens - plan.decode_tokens
    return STEP + (DECODES if plan.decode_tokens else 0) + TOKEN * prompt


@dataclass
class Served:
    """One request: when it came, and when it got each of its tokens."""

    sequence: Sequence
    came: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.came

    def per_token(self, begin: float, end: float) -> float:
        """Seconds per token over a span of time."""
        inside = [t for t in self.tokens if begin <= t <= end]
        return (inside[-1] - inside[0]) / (len(inside) - 1)


class World:
    """A scheduler on a virtual clock."""

    def __init__(self, running: int = 8, units: int = 2000, cost: Callable[[StepPlan], float] = seconds_of) -> None:
        self.scheduler = make(units=units, budget=BUDGET, running=running)
        self.now = 0.0
        self.served: dict[str, Served] = {}
        self._cost = cost

    def add(self, name: str, prompt: int, output: int = 2) -> Served:
        self.served[name] = Served(add(self.scheduler, name, prompt, output), self.now)
        return self.served[name]

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.now += self._cost(plan)
        self.scheduler.commit(plan)
        self.scheduler.observe(plan, self._cost(plan))
        for item in plan.sequences:
            sequence = item.running.sequence
            if item.samples:
                sequence.append(3)
                self.served[item.request_id].tokens.append(self.now)
                if sequence.output_tokens >= sequence.max_output_tokens:
                    self.scheduler.finish(item.running, keep_state=True)
        return plan

    def run(self, until: Callable[[], bool], most: int = 100_000) -> None:
        for _ in range(most):
            if until():
                return
            self.step()
        raise AssertionError(f"not over after {most} steps")

    def over(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)


def alone(prompt: int) -> float:
    """TTFT of a prompt in an idle engine."""
    world = World()
    served = world.add("alone", prompt)
    world.run(world.over)
    return served.ttft


@pytest.mark.parametrize("seed", range(4))
def test_short_requests_and_decodes_beside_a_long_prefill(seed: int) -> None:
    """The promise: TTFT of short prompts within 2 x idle at p99, decodes at half their speed, the long one advances."""
    world, random = World(), np.random.default_rng(seed)
    decode = world.add("decode", 200, output=100_000)
    world.run(lambda: len(decode.tokens) >= 50)
    idle_token = decode.per_token(0, world.now)
    begin, long = world.now, world.add("long prefill", 60_000)
    shorts, next_at = [], begin + 0.1
    while not long.tokens:
        if world.now >= next_at:
            shorts.append(world.add(f"short {len(shorts)}", 2 * BUDGET))
            next_at = world.now + random.uniform(0.2, 0.8)
        world.step()
    world.run(lambda: all(s.tokens for s in shorts))
    assert len(shorts) > 10
    assert np.percentile([s.ttft for s in shorts], 99) <= 2 * alone(2 * BUDGET)
    assert decode.per_token(begin, long.tokens[0]) <= 2 * idle_token
    work = 60_000 * TOKEN + len(shorts) * 2 * BUDGET * TOKEN
    assert long.ttft <= 3 * work, "decodes have half of the time, and short prompts little of it"


def test_a_prompt_alone_beside_decodes_uses_the_time_that_they_leave() -> None:
    world = World()
    decode = world.add("decode", 10, output=100_000)
    world.run(lambda: len(decode.tokens) >= 20)
    begin, long = world.now, world.add("long prefill", 30_000)
    world.run(lambda: bool(long.tokens))
    assert decode.per_token(begin, world.now) >= 1.7 * (STEP + DECODES), "half of the time, not much less"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nobody_starves_in_any_order_of_arrival(data: st.DataObject) -> None:
    """However requests come, and at whatever cost of steps, each ends."""
    costs = data.draw(st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=5))
    count = iter(range(1 << 30))
    world = World(running=data.draw(st.integers(1, 5)), cost=lambda plan: costs[(next(count) // 2) % len(costs)])
    arrivals = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6000), st.integers(1, 30)), max_size=12))
    for number, (steps, prompt, output) in enumerate(arrivals):
        for _ in range(steps):
            world.step()
        world.add(f"request {number}", prompt, output)
    total = sum(prompt + output for _, prompt, output in arrivals)
    # At least a decode, or QUANTUM of prompts once credit is full, in every few steps.
    world.run(world.over, most=200 + 40 * sum(o for _, _, o in arrivals) + 20 * total // QUANTUM)
    assert all(len(s.tokens) == s.sequence.max_output_tokens for s in world.served.values())


def test_an_endless_stream_of_short_requests_does_not_keep_a_long_one_out() -> None:
    """One slot, always somebody shorter waiting: age makes up for work."""
    world = World(running=1)
    for n in range(3):
        world.add(f"short {n}", 100)
    long = world.add("long", 3000)
    for n in range(3, 2000):
        world.add(f"short {n}", 100)
        world.step()
        world.step()
        if long.tokens:
            break
    assert long.tokens, "3000 tokens are worth 24,000 given to others: about 240 short requests"


def test_least_uncached_work_starts_first_and_priority_before_it() -> None:
    world = World(running=1)
    world.add("running", 200)
    world.step()
    for name, prompt in (("large", 900), ("small", 40), ("middle", 300)):
        world.add(name, prompt)
    world.run(world.over)
    order = sorted(world.served, key=lambda name: world.served[name].tokens[0])
    assert order == ["running", "small", "middle", "large"]


def test_what_is_cached_is_no_work() -> None:
    world = World(running=1)
    first = world.add("document", 3000)
    world.run(world.over)
    world.add("running", 200)
    world.step()
    world.add("fresh", 1000)
    again = world.add("document", 3000)  # the same tokens
    world.run(world.over)
    assert first.tokens and again.tokens[0] < world.served["fresh"].tokens[0]


def test_pace_lets_prompts_in_for_good() -> None:
    """Whatever steps cost, a prompt is let in again after some steps of decodes alone."""
    for decode, token in ((1e-3, 1.0), (5.0, 1e-6), (1e-6, 1e-3)):
        pace = Pace(burst_tokens=512)
        pace.observe(0, 128, 128 * token)
        pace.observe(1, 0, decode)
        pace.observe(1, 512, decode + 512 * token)
        waited = 0
        while pace.prompt_tokens(long=True) == 0:
            pace.observe(1, 0, decode)
            waited += 1
            assert waited <= 10 + 2 * 512 * token * 2 / (decode / 2)


def test_pace_knows_nothing_at_first() -> None:
    pace = Pace(burst_tokens=512)
    assert pace.prompt_tokens(long=True) is None
    pace.observe(0, 100, 0.01)
    assert pace.prompt_tokens(long=False) is None
    pace.observe(2, 100, 0.02)  # decodes joined a prompt that is known: the rest is theirs
    assert pace.prompt_tokens(long=False) is not None


def test_what_is_expected_is_about_what_comes() -> None:
    """Alone, behind a shorter one, beside a longer one and beside decodes; nothing is known before the first prompt."""
    world = World()
    assert world.scheduler.expected_seconds(world.add("first", 2000).sequence) is None
    world.run(world.over)
    for others in ((), ((600, 2),), ((9000, 2),), ((20, 2000), (9000, 2))):
        world = World()
        world.add("first", 4000)
        world.run(world.over)
        for number, (prompt, output) in enumerate(others):
            world.add(f"other {number}", prompt, output)
        for _ in range(6 if others else 0):
            world.step()
        own = world.add("own", 3000)
        expected = world.scheduler.expected_seconds(own.sequence)
        world.run(lambda own=own: bool(own.tokens))
        assert expected is not None and own.ttft / 2 <= expected <= 2 * own.ttft, others


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_noise_of_a_busy_machine_keeps_no_prompt_out(spread: float) -> None:
    """Steps that now and then take ten times as long, for reasons of their own: a prompt beside decodes has the time
    that the promise leaves it, however uneven they are, and decodes keep their share."""
    pace, noise = Pace(burst_tokens=2048), random.Random(0)
    decode, token, alone, beside, computed = 1e-3, 1e-5, 0.0, 0.0, 0
    pace.observe(0, 1024, 1024 * token)
    for _ in range(4000):
        tokens = pace.prompt_tokens(long=True)
        tokens = 1024 if tokens is None else min(tokens, 1024)
        took = (decode + tokens * token) * noise.lognormvariate(-(spread**2) / 2, spread)
        pace.observe(1, tokens, took)
        alone, beside, computed = alone + decode, beside + decode + tokens * token, computed + tokens
    assert alone / beside > 0.5, "decodes are slowed down more than is promised"
    assert computed * token > 0.25 * beside, "a prompt gets a quarter of the time at the least"
