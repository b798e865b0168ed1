"""Pools conserve blocks under any order of calls."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thalweg.cache.pool import BlockPool

TOTAL = 5


class PoolMachine(RuleBasedStateMachine):
    """Requests and the index hold references, several to a block; the model counts both by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.held: list[int] = []
        self.cached: list[int] = []

    @precondition(lambda self: self.pool.free_blocks > 0)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert block not in self.held and block not in self.cached
        self.held.append(block)

    @precondition(lambda self: self.held or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({*self.held, *self.cached})))
        self.held.append(self.pool.share(block))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.cached.append(block)
        self.pool.keep(block)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.cached))
        self.cached.remove(block)
        self.pool.drop(block)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        known = {*self.held, *self.cached}
        assert self.pool.free_blocks == TOTAL - len(known)
        assert self.pool.cached_blocks == len(set(self.cached))
        assert self.pool.idle_blocks == len(set(self.cached) - set(self.held))
        for block in range(TOTAL):
            assert self.pool.references()[block] == self.held.count(block) + self.cached.count(block)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
