"""What must hold of the cache: nothing is lost, everything written is found, all groups or nothing, probing is free."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.cache.shapes import MODEL, configs, coordinator_of, free_blocks
from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import Group
from thalweg.cache.prefix_index import Namespace
from thalweg.cache.sequence import SequenceCache
from thalweg.config.model import ModelConfig
from thalweg.types import MissReason, TokenArray

UNIT = 128
SPACE = Namespace(b"space")


def tokens_of(seed: int, count: int) -> TokenArray:
    return np.random.default_rng(seed).integers(0, 50, count).astype(np.int32)


def compute(coordinator: Coordinator, cache: SequenceCache, tokens: TokenArray, chunk: int = 100) -> bool:
    """Reserve and commit all of a prompt in chunks; False if the pools ran short."""
    while cache.computed_tokens < len(tokens):
        end = min(len(tokens), cache.computed_tokens + chunk)
        if not coordinator.reserve(cache, end):
            return False
        coordinator.commit(cache, tokens, end)
        coordinator.check()
    return True


def run(coordinator: Coordinator, tokens: TokenArray, space: Namespace = SPACE, chunk: int = 100) -> SequenceCache:
    """One whole request, from attach to release; returns its cache state for the record of what was attached."""
    cache = coordinator.attach(tokens, space)
    assert cache is not None and compute(coordinator, cache, tokens, chunk)
    coordinator.release(cache, keep_state=True)
    coordinator.check()
    return cache


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 130, 255, 256, 257, 500, 512, 513])
@pytest.mark.parametrize("chunk", [1, 7, 128, 129, 600])
def test_the_same_prompt_again_is_cached_up_to_its_last_unit(length: int, chunk: int) -> None:
    coordinator = coordinator_of(MODEL, 16, 8)
    tokens = tokens_of(0, length)
    first = run(coordinator, tokens, chunk=chunk)
    again = run(coordinator, tokens, chunk=chunk)
    reusable = (length - 1) // UNIT * UNIT
    assert first.report.cached_tokens == 0
    assert again.report.cached_tokens == reusable
    assert again.report.reason is (MissReason.NONE if reusable else MissReason.TOO_SHORT)


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 700), st.integers(1, 700), st.integers(0, 700), st.integers(1, 300))
def test_everything_written_is_found(config: ModelConfig, length: int, extra: int, cut: int, chunk: int) -> None:
    """A longer prompt resumes at the end of the shorter one; one that branches off resumes at a unit of the common part
    once somebody has branched there before."""
    coordinator = coordinator_of(config, 64, 64)
    tokens = tokens_of(1, length)
    run(coordinator, tokens, chunk=chunk)
    longer = np.concatenate([tokens, tokens_of(2, extra)])
    assert run(coordinator, longer, chunk=chunk).report.cached_tokens == length // UNIT * UNIT
    cut = min(cut, len(longer) - 1)
    branch = np.concatenate([longer[:cut], [99], tokens_of(3, 200)]).astype(np.int32)
    run(coordinator, branch, chunk=chunk)
    other = np.concatenate([longer[:cut], [98], tokens_of(4, 200)]).astype(np.int32)
    found = run(coordinator, other, chunk=chunk).report
    assert found.cached_tokens == cut // UNIT * UNIT


def test_probing_changes_nothing() -> None:
    coordinator = coordinator_of(MODEL, 8, 4)
    tokens = tokens_of(0, 600)
    run(coordinator, tokens)
    before = (free_blocks(coordinator), [n.used for n in coordinator.index.units()])
    for length in (1, 128, 400, 600):
        coordinator.probe(tokens[:length], SPACE)
        coordinator.probe(tokens[:length], Namespace(b"other"))
    assert (free_blocks(coordinator), [n.used for n in coordinator.index.units()]) == before


def test_reasons() -> None:
    coordinator = coordinator_of(MODEL, 12, 4, interval=0)
    tokens = tokens_of(0, 600)
    assert run(coordinator, tokens).report.reason is MissReason.COLD
    diverging = tokens.copy()
    diverging[300] = 77
    report = run(coordinator, diverging).report
    assert (report.reason, report.divergence_token) == (MissReason.NO_CHECKPOINT, 300)
    diverging[301] = 78
    report = run(coordinator, diverging).report
    assert (report.reason, report.cached_tokens) == (MissReason.DIVERGED, 256)
    assert report.divergence_token == 301
    other = run(coordinator, tokens, Namespace(b"other salt")).report
    assert (other.reason, other.cached_tokens) == (MissReason.TENANT, 0)
    other = run(coordinator, tokens, Namespace(b"other tenant", tenant=b"other")).report
    assert (other.reason, other.cached_tokens) == (MissReason.COLD, 0)
    off = coordinator_of(MODEL, 12, 4, caching=False)
    run(off, tokens)
    assert run(off, tokens).report.reason is MissReason.DISABLED


def test_an_evicted_prefix_says_so() -> None:
    coordinator = coordinator_of(MODEL, 6, 8)
    first = tokens_of(0, 600)
    run(coordinator, first)
    run(coordinator, tokens_of(1, 600))
    report = run(coordinator, first).report
    assert report.reason is MissReason.EVICTED
    assert coordinator.evicted_units > 0


def test_prompts_that_fill_the_cache_hit_when_replayed() -> None:
    """Ten prompts of 90% of the stated capacity: at least 95% of their tokens hit the second time."""
    coordinator = coordinator_of(MODEL, 100, 40)
    prompts = [tokens_of(i, 9 * UNIT) for i in range(10)]
    for prompt in prompts:
        run(coordinator, prompt)
    hits = sum(run(coordinator, prompt).report.cached_tokens for prompt in prompts)
    assert hits >= 0.95 * sum((len(p) - 1) // UNIT * UNIT for p in prompts)
    assert coordinator.evicted_units == 0


def test_window_churn_never_evicts_compressed_rows() -> None:
    coordinator = coordinator_of(MODEL, 64, 2, interval=UNIT)
    run(coordinator, tokens_of(0, 20 * UNIT))
    assert coordinator.evicted_checkpoints > 0
    assert coordinator.evicted_units == 0
    assert coordinator.index.nodes == 20


def test_what_is_used_often_outlives_a_flood_of_what_is_used_once() -> None:
    coordinator = coordinator_of(MODEL, 24, 10, interval=0)
    hot = tokens_of(0, 5 * UNIT + 1)
    for _ in range(12):
        run(coordinator, hot)
    for seed in range(1, 9):
        run(coordinator, tokens_of(seed, 4 * UNIT + 1))
        assert coordinator.probe(hot, SPACE).resume == 5
    assert coordinator.evicted_units > 0


def test_what_was_used_often_is_overtaken_in_time() -> None:
    coordinator = coordinator_of(MODEL, 12, 10, interval=0)
    for _ in range(5):
        run(coordinator, tokens_of(0, 5 * UNIT + 1))
    for seed in range(1, 60):
        run(coordinator, tokens_of(seed, 4 * UNIT + 1))
    assert coordinator.probe(tokens_of(0, 5 * UNIT + 1), SPACE).resume < 5


def test_a_checkpoint_that_saves_more_stays() -> None:
    """Of checkpoints of equal use, one that saves a long way outlives those that save a unit."""
    coordinator = coordinator_of(MODEL, 64, 2, interval=0, running=1)
    run(coordinator, tokens_of(0, 9 * UNIT + 1))
    for seed in range(1, 9):
        run(coordinator, tokens_of(seed, UNIT + 1))
    assert coordinator.evicted_checkpoints > 0
    assert coordinator.probe(tokens_of(0, 9 * UNIT + 1), SPACE).resume == 9


def test_a_request_that_cannot_fit_takes_nothing() -> None:
    coordinator = coordinator_of(MODEL, 4, 4)
    holder = coordinator.attach(tokens_of(0, 3 * UNIT), SPACE)
    assert holder is not None
    before = free_blocks(coordinator)
    assert coordinator.attach(tokens_of(1, 2 * UNIT), SPACE) is None
    assert coordinator.reserve(holder, 5 * UNIT) is False
    assert free_blocks(coordinator) == before
    coordinator.check()


def test_reset_forgets_but_keeps_what_runs() -> None:
    coordinator = coordinator_of(MODEL, 16, 8)
    tokens = tokens_of(0, 600)
    run(coordinator, tokens)
    running = coordinator.attach(tokens, SPACE)
    assert running is not None and running.computed_tokens == 512
    assert coordinator.reset() == 512
    coordinator.check()
    assert compute(coordinator, running, tokens)
    coordinator.release(running, keep_state=True)
    coordinator.check()
    assert all(pool.free_blocks == pool.total_blocks for pool in coordinator.pools.values())
    assert run(coordinator, tokens).report.cached_tokens == 0


class CacheMachine(RuleBasedStateMachine):
    """Several requests of related prompts in a cache too small for all of them, in any order of steps."""

    @initialize(
        config=configs(),
        units=st.integers(6, 14),
        checkpoints=st.integers(0, 6),
        interval=st.sampled_from([0, 128, 384]),
    )
    def begin(self, config: ModelConfig, units: int, checkpoints: int, interval: int) -> None:
        self.coordinator = coordinator_of(config, units, checkpoints, interval=interval)
        self.running: list[tuple[SequenceCache, TokenArray]] = []

    @precondition(lambda self: len(self.running) < 3)
    @rule(
        seed=st.integers(0, 2),
        length=st.integers(1, 700),
        branch=st.integers(0, 700),
        space=st.sampled_from([Namespace(b"a"), Namespace(b"b")]),
    )
    def attach(self, seed: int, length: int, branch: int, space: Namespace) -> None:
        tokens = tokens_of(0, length)
        if branch < length:
            tokens[branch:] = tokens_of(10 + seed, length - branch)
        match = self.coordinator.probe(tokens, space)
        cache = self.coordinator.attach(tokens, space)
        if cache is None:
            return
        assert cache.computed_tokens == match.resume * UNIT < length
        self.running.append((cache, tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 300))
    def step(self, data: st.DataObject, count: int) -> None:
        cache, tokens = data.draw(st.sampled_from(self.running))
        end = min(len(tokens), cache.computed_tokens + count)
        if end == cache.computed_tokens:
            return
        if self.coordinator.reserve(cache, end):
            self.check_blocks_for(cache, end)
            self.coordinator.commit(cache, tokens, end)
        else:
            self.check_compressed_rows_are_short(cache, end)

    def check_compressed_rows_are_short(self, cache: SequenceCache, end: int) -> None:
        """A step is refused for want of compressed rows alone: every running request's sliding blocks are provided for,
        and whatever is idle can be evicted."""
        short = False
        for spec in self.coordinator.groups:
            pool = self.coordinator.pools[spec.group]
            if spec.compressed:
                needed = -(-end // spec.tokens_per_block) - len(cache.growing[spec.group])
                short |= needed > pool.free_blocks + pool.idle_blocks
        assert short

    def check_blocks_for(self, cache: SequenceCache, end: int) -> None:
        """A hit is warm for every group: each block that computing up to `end` reads or writes is there."""
        for spec in self.coordinator.groups:
            last = (end - 1) // spec.tokens_per_block
            if spec.compressed:
                assert len(cache.growing[spec.group]) > last
                continue
            needed = {last} if spec.group is not Group.PENDING or end % UNIT else set()
            if cache.computed_tokens:
                start = cache.computed_tokens
                behind = range(spec.first_live_block(start), -(-start // spec.tokens_per_block))
                needed |= set(behind)
            assert all(number in cache.sliding[spec.group] for number in needed)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        place = data.draw(st.integers(0, len(self.running) - 1))
        cache, _ = self.running.pop(place)
        self.coordinator.release(cache, keep_state=keep)

    @rule()
    def reset(self) -> None:
        self.coordinator.reset()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "coordinator"):
            self.coordinator.check()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
