"""Steps of one token between two boundaries leave the pools alone, and many of them are one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.shapes import configs, coordinator_of, free_blocks
from thalweg.cache.coordinator import Coordinator
from thalweg.cache.prefix_index import Namespace
from thalweg.cache.sequence import SequenceCache
from thalweg.config.model import ModelConfig
from thalweg.memory.capacity import live_blocks

HERE = Namespace(b"here")


def started(config: ModelConfig, prompt: np.ndarray, chunk: int) -> tuple[Coordinator, SequenceCache]:
    """A request behind its prompt, after the same prompt of another that left its checkpoints."""
    coordinator = coordinator_of(config, units=40, checkpoints=6)
    for ends in (True, False):
        cache = coordinator.attach(prompt, HERE)
        assert cache is not None
        while cache.computed_tokens < len(prompt):
            step(coordinator, cache, prompt, min(len(prompt), cache.computed_tokens + chunk))
        if ends:
            coordinator.release(cache, keep_state=True)
    return coordinator, cache


def step(coordinator: Coordinator, cache: SequenceCache, tokens: np.ndarray, end: int) -> None:
    assert coordinator.reserve(cache, end)
    coordinator.commit(cache, tokens, end)


def held(coordinator: Coordinator, cache: SequenceCache) -> tuple:
    """Everything that must not depend on how many steps were one."""
    numbers = {group: sorted(table.numbers()) for group, table in cache.sliding.items()}
    spare = {group: len(table.spare) for group, table in cache.sliding.items()}
    return cache.computed_tokens, numbers, spare, free_blocks(coordinator), coordinator.index.nodes


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 700), st.integers(1, 300), st.integers(1, 500))
def test_many_quiet_steps_are_one(config: ModelConfig, prompt: int, chunk: int, output: int) -> None:
    tokens = np.random.default_rng(prompt).integers(0, 90, prompt + output).astype(np.int32)
    single, at_once = (started(config, tokens[:prompt], chunk) for _ in range(2))
    while at_once[1].computed_tokens < len(tokens):
        coordinator, cache = at_once
        quiet = min(cache.quiet_until, len(tokens))
        if quiet > cache.computed_tokens:
            cache.advance(quiet)
        else:
            step(coordinator, cache, tokens, cache.computed_tokens + 1)
        while single[1].computed_tokens < cache.computed_tokens:
            step(*single, tokens, single[1].computed_tokens + 1)
        assert held(*single) == held(*at_once)
        coordinator.check()
    for coordinator, cache in (single, at_once):
        coordinator.release(cache, keep_state=True)
        coordinator.check()


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(1, 300))
def test_most_single_steps_are_quiet_and_hold_no_more_than_a_request_may(config: ModelConfig, prompt: int) -> None:
    tokens = np.zeros(prompt + 4 * config.unit_tokens, np.int32)
    coordinator, cache = started(config, tokens[:prompt], 64)
    before, changes = free_blocks(coordinator), 0
    while cache.computed_tokens < len(tokens):
        step(coordinator, cache, tokens, cache.computed_tokens + 1)
        now = free_blocks(coordinator)
        changes, before = changes + (now != before), now
        for spec in coordinator.groups:
            if not spec.compressed:
                table = cache.sliding[spec.group]
                assert len(table) + len(table.spare) <= live_blocks(spec)
    assert changes <= 30, "most steps touched the pools"
