"""The cache as the scheduler sees it: attach a prefix, reserve room for a step, commit it, release.

All groups move together: a prefix is attached for every group at one resume point or not at all, and a step's blocks
are reserved in every pool or in none. Lower tiers see blocks through `hold_rows`, `begin_load` and `restore`: whatever
is being copied is held like a running request's blocks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence, Sized

from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.cache.keys import UnitKeys
from thalweg.cache.policy import CheckpointPolicy, CheckpointReason, Resume
from thalweg.cache.pool import BlockPool, GroupUsage
from thalweg.cache.prefix_index import Blocks, Match, Namespace, PrefixIndex, UnitNode
from thalweg.cache.sequence import SequenceCache, Snapshot
from thalweg.cache.tables import GrowingTable, SlidingTable
from thalweg.types import CacheReport, MissReason

Held = tuple[tuple[Group, int], ...]
_NO_MATCH = Match((), 0, False)
_FRESH_KEPT = 4096


class Coordinator:
    """Pools of all groups and the prefix index over them. Not thread-safe: the engine thread owns it."""

    def __init__(
        self,
        groups: tuple[CacheGroupSpec, ...],
        pool_blocks: Mapping[Group, int],
        policy: CheckpointPolicy,
        *,
        prefix_caching: bool = True,
        keys: UnitKeys | None = None,
    ) -> None:
        self.groups = groups
        self.policy = policy
        self.prefix_caching = prefix_caching
        self.pools = {spec.group: BlockPool(pool_blocks[spec.group]) for spec in groups}
        self.index = PrefixIndex(policy.unit_tokens, keys)
        self.fresh_checkpoints: deque[UnitNode] = deque(maxlen=_FRESH_KEPT)  # made since somebody last took them
        self.checkpoints_made: Counter[CheckpointReason] = Counter()
        self.evicted: Counter[Group] = Counter()  # units or checkpoints, by the group that needed room
        self._compressed = tuple(s for s in groups if s.compressed)
        self._sliding = tuple(s for s in groups if not s.compressed)
        self._running: set[SequenceCache] = set()
        self._held: Counter[tuple[Group, int]] = Counter()

    # -- attaching --------------------------------------------------------------------------------------------

    def probe(self, tokens: Sized, namespace: Namespace) -> Match:
        """How far `tokens` is cached. Changes nothing. At least one token is always left to compute."""
        if not self.prefix_caching:
            return _NO_MATCH
        return self.index.match(namespace, tokens, self.reusable_units(len(tokens)))

    def reusable_units(self, tokens: int) -> int:
        """Units of a prompt that may come from a cache."""
        return (tokens - 1) // self.policy.unit_tokens

    def attach(
        self, tokens: Sized, namespace: Namespace, hints: Iterable[int] = (), *, reuse: bool = True
    ) -> SequenceCache | None:
        """Start a request where least is left to compute, or None if the pools cannot promise room for its tokens.

        Without `reuse` it computes everything and publishes nothing.
        """
        caching = reuse and self.prefix_caching
        match = self.probe(tokens, namespace) if caching else _NO_MATCH
        resume = self.policy.resume(len(match.path), match.resume)
        attached = match.path[: resume.units]
        if not self._room_for(attached, len(tokens)):
            return None
        unit = self.policy.unit_tokens
        divergence = len(match.path) * unit if len(match.path) > match.resume else 0
        chosen = self.policy.of_prompt(len(tokens), hints, divergence)
        reason, divergence_token = self._explain(match, tokens, namespace, caching)
        reused = resume.start or resume.replayed
        report = CacheReport(
            resume.start,
            replayed_tokens=resume.replayed,
            reason=reason,
            divergence_token=divergence_token,
            approximation=self.policy.approximation if reused else None,
        )
        node = None
        if caching:
            node = attached[-1] if attached else self.index.root(namespace)
            self.index.touch(match.path, attached[-1] if attached and not resume.replayed else None)
        cache = self._start(report, resume, node, chosen, attached, len(tokens))
        if attached and not resume.replayed:
            self._share_checkpoint(cache, attached[-1])
        return cache

    def fits(self, match: Match, tokens: int) -> bool:
        """Whether a request of so many tokens could be admitted now, on the prefix that was found."""
        return self._room_for(match.path, tokens)

    def fits_free(self, tokens: int) -> bool:
        """Whether so many tokens fit without evicting anything."""
        return all(-(-tokens // s.tokens_per_block) <= self.pools[s.group].free_blocks for s in self._compressed)

    def _start(
        self,
        report: CacheReport,
        resume: Resume,
        node: UnitNode | None,
        chosen: Mapping[int, CheckpointReason],
        attached: Sequence[UnitNode],
        target: int,
    ) -> SequenceCache:
        """A running request that holds the rows of the attached units."""
        rows_from = len(attached) * self.policy.unit_tokens
        cache = SequenceCache(report, resume, node, chosen, rows_from=rows_from, target_tokens=target)
        if node is not None:
            self.index.pin(node)
        for spec in self._compressed:
            table = cache.growing[spec.group] = GrowingTable()
            for unit_node in attached:
                table.append(self.pools[spec.group].share(unit_node.blocks[spec.group]))
        for spec in self._sliding:
            cache.sliding[spec.group] = SlidingTable(spec)
        self._running.add(cache)
        return cache

    def _share_checkpoint(self, cache: SequenceCache, node: UnitNode) -> None:
        assert node.checkpoint is not None, "resumed at a unit without a checkpoint"
        for spec in self._sliding:
            numbers = spec.checkpoint_numbers(cache.computed_tokens)
            for number, block in zip(numbers, node.checkpoint[spec.group], strict=True):
                cache.sliding[spec.group].put(number, self.pools[spec.group].share(block))

    def _room_for(self, attached: Sequence[UnitNode], tokens: int) -> bool:
        """True if every known token of this request fits beside what running requests were promised."""
        promised = 0  # the same in all compressed groups: they grow together, and a block of each is a unit
        for spec in self._compressed[:1]:
            size, group = spec.tokens_per_block, spec.group
            ahead = [(c.target_tokens, len(c.growing[group])) for c in self._running]
            promised = sum(-(-target // size) - held for target, held in ahead if held * size < target)
        for spec in self._compressed:
            pool = self.pools[spec.group]
            shared = [node.blocks[spec.group] for node in attached]
            idle = pool.idle_blocks - sum(map(pool.is_idle, shared))
            if -(-tokens // spec.tokens_per_block) - len(shared) > pool.free_blocks + idle - promised:
                return False
        return True

    def _explain(
        self, match: Match, tokens: Sized, namespace: Namespace, caching: bool
    ) -> tuple[MissReason, int | None]:
        limit = self.reusable_units(len(tokens))
        if not caching:
            return MissReason.DISABLED, None
        if limit == 0:
            return MissReason.TOO_SHORT, None
        if match.resume == limit or (len(match.path) == limit and not self.policy.keeps):
            return MissReason.NONE, None
        if match.next_was_evicted:
            return MissReason.EVICTED, None
        if len(match.path) > match.resume and self.policy.keeps:
            reason = MissReason.NO_CHECKPOINT
        elif match.path and not match.path[-1].children:
            return MissReason.NONE, None
        elif not match.path and self.index.under_other_salt(namespace, tokens):
            return MissReason.TENANT, None
        elif not match.path and not self.index.root(namespace).children:
            return MissReason.COLD, None
        else:
            reason = MissReason.DIVERGED
        return reason, self.index.common_tokens(namespace, match, tokens)

    # -- lower tiers ------------------------------------------------------------------------------------------

    def begin_load(self, tokens: Sized, namespace: Namespace, units: int, *, checkpoint: bool) -> SequenceCache | None:
        """Blocks for the rows of the first `units` units that are not here, and for the checkpoint after them.

        The result counts as a running request until `finish_load`. None if the pools cannot promise room for the
        request's tokens.
        """
        path = self.probe(tokens, namespace).path[:units]
        if not self._room_for(path, len(tokens)):
            return None
        unit = self.policy.unit_tokens
        node = path[-1] if path else self.index.root(namespace)
        cache = self._start(CacheReport(), Resume(len(path), len(path) * unit, 0), node, {}, path, len(tokens))
        wanted: dict[Group, Sequence[int]] = {s.group: range(len(path), units) for s in self._compressed}
        for spec in self._sliding:
            wanted[spec.group] = list(spec.checkpoint_numbers(units * unit)) if checkpoint else []
        if not self._allocate(cache, wanted):
            self._drop(cache)
            return None
        return cache

    def finish_load(self, cache: SequenceCache, tokens: Sized, units: int, *, checkpoint: bool) -> None:
        """Rows up to unit `units` have arrived: publish them, with the checkpoint after them if that has, too."""
        unit = self.policy.unit_tokens
        assert cache.computed_tokens <= units * unit, "less was loaded than was there before"
        start, cache.computed_tokens = cache.computed_tokens, units * unit
        cache.stored_units = units
        cache.planned = {units * unit: CheckpointReason.LOADED} if checkpoint else {}
        self._publish(cache, tokens, start - 1)
        self._drop(cache)

    def restore(self, tokens: Sized, namespace: Namespace, saved: Snapshot) -> SequenceCache | None:
        """Blocks for a request that gave way and comes back with its rows; None if there is no room.

        It holds the same block numbers as before. Blocks of units that the index still has are shared: `rows_from` says
        how far those go, and all others are to be filled by the caller.
        """
        caching = self.prefix_caching
        path = self.probe(tokens, namespace).path[: saved.computed_tokens // self.policy.unit_tokens] if caching else ()
        if not self._room_for(path, max(len(tokens), saved.target_tokens)):
            return None
        node = (path[-1] if path else self.index.root(namespace)) if caching else None
        resume = Resume(len(path), saved.computed_tokens, 0)
        cache = self._start(CacheReport(), resume, node, saved.chosen, path, max(len(tokens), saved.target_tokens))
        cache.state_from = saved.state_from
        wanted = {group: [n for n in numbers if n >= len(path)] for group, numbers in saved.numbers.items()}
        wanted |= {spec.group: list(saved.numbers[spec.group]) for spec in self._sliding}
        if not self._allocate(cache, wanted):
            self._drop(cache)
            return None
        return cache

    def finish_restore(self, cache: SequenceCache, tokens: Sized, saved: Snapshot, *, filled: bool) -> None:
        """The blocks of a restored request hold its rows again, or, where they could not be filled, are given up."""
        if not filled:
            self._drop(cache)
            return
        cache.rows_from = max(cache.rows_from, saved.rows_from)
        self._publish(cache, tokens, cache.computed_tokens)

    def hold_rows(self, nodes: Sequence[UnitNode]) -> Held:
        """Keep the rows of these units in their blocks until `unhold`."""
        return self._hold((group, block) for node in nodes for group, block in node.blocks.items())

    def hold_checkpoint(self, node: UnitNode) -> Held:
        assert node.checkpoint is not None, "held a checkpoint that is not there"
        return self._hold((group, block) for group, blocks in node.checkpoint.items() for block in blocks)

    def _hold(self, blocks: Iterable[tuple[Group, int]]) -> Held:
        held = tuple(blocks)
        for group, block in held:
            self.pools[group].share(block)
        self._held.update(held)
        return held

    def unhold(self, held: Held) -> None:
        for group, block in held:
            self.pools[group].release(block)
        self._held.subtract(held)
        self._held += Counter()  # drops the zeros

    def _allocate(self, cache: SequenceCache, wanted: Mapping[Group, Sequence[int]]) -> bool:
        """Give a request free blocks at these numbers in every pool, or in none and False. May evict idle blocks."""
        lacking = {}
        for group, numbers in wanted.items():
            if len(numbers) > (spare := len(cache.sliding[group].spare) if group in cache.sliding else 0):
                lacking[group] = len(numbers) - spare
        if lacking and not self._make_room(lacking):
            return False
        for spec in self._compressed:
            for _ in wanted[spec.group]:
                cache.growing[spec.group].append(self.pools[spec.group].allocate())
        for spec in self._sliding:
            table, pool = cache.sliding[spec.group], self.pools[spec.group]
            for number in wanted[spec.group]:
                table.put(number, table.spare.pop() if table.spare else pool.allocate())
        return True

    def _drop(self, cache: SequenceCache) -> None:
        """Take a request's references back."""
        if cache.node is not None:
            self.index.unpin(cache.node)
        cache.release(self.pools)
        self._running.remove(cache)

    # -- steps ------------------------------------------------------------------------------------------------

    def reserve(self, cache: SequenceCache, end: int) -> bool:
        """Blocks for computing tokens up to `end`: in all pools, or in none and False. May evict idle blocks."""
        if cache.begins_alone(end, self.policy.unit_tokens, self.pools):
            return True
        planned = self._planned(cache, end)
        last = self._last_boundary(cache, end)
        if not self._allocate(cache, cache.wanted(self.groups, end, last, planned)):
            planned = {}  # checkpoints are a wish, the step itself is not
            if not self._allocate(cache, cache.wanted(self.groups, end, last, planned)):
                return False
        cache.planned = planned
        return True

    def _planned(self, cache: SequenceCache, end: int) -> Mapping[int, CheckpointReason]:
        """Checkpoints on the way to `end`. State before the end of a replay is not exact: none is kept there."""
        if cache.node is None:
            return {}
        start = max(cache.computed_tokens, cache.rows_from - 1)
        return self.policy.wanted(cache.chosen, start, end)

    def commit(self, cache: SequenceCache, tokens: Sized, end: int) -> None:
        """Tokens up to `end` are in the blocks: publish finished units and let go of what is not needed any more."""
        if cache.ends_alone(end, self.policy.unit_tokens, self.pools):
            return
        start, cache.computed_tokens = cache.computed_tokens, end
        self._publish(cache, tokens, start)
        cache.planned = {}
        last = self._last_boundary(cache, end)
        for spec in self._sliding:
            table, pool = cache.sliding[spec.group], self.pools[spec.group]
            needed = spec.needed_numbers(end, last)
            for number in [n for n in table.numbers() if n not in needed]:
                block = table.pop(number)
                if not (pool.is_sole(block) and table.spare_if_few(block)):
                    pool.release(block)

    def release(self, cache: SequenceCache, *, keep_state: bool) -> None:
        """End a request. With `keep_state` the last boundary it passed gets a checkpoint (end of output)."""
        boundary = self.policy.boundary(cache.computed_tokens)
        node = cache.node
        passed = node is not None and node.alive and 0 < boundary == node.depth * self.policy.unit_tokens
        if keep_state and passed and node is not None and self.policy.at_end_of_output():
            self._keep_checkpoint(cache, node, CheckpointReason.END_OF_OUTPUT)
        self._drop(cache)

    def _last_boundary(self, cache: SequenceCache, end: int) -> int | None:
        """Where a request that ends after a step to `end` gets a checkpoint; None: nowhere."""
        return self.policy.boundary(end) if cache.node is not None else None

    def _publish(self, cache: SequenceCache, tokens: Sized, start: int) -> None:
        """Walk or extend the index to the last complete unit; attach the planned checkpoints on the way.

        `start` is where the step began: a replay ends on the unit that it stands on already.
        """
        node = cache.node
        if node is None:
            return
        unit = self.policy.unit_tokens
        self.index.unpin(node)
        if start < node.depth * unit <= cache.computed_tokens:
            self._plan_met(cache, node)
        while node.alive and (node.depth + 1) * unit <= cache.computed_tokens:
            known = self.index.child(node, tokens)
            if known is None:
                blocks = {s.group: cache.growing[s.group][node.depth] for s in self._compressed}
                for group, block in blocks.items():
                    self.pools[group].keep(block)
                known = self.index.insert(node, tokens, blocks)
                known.stored = known.depth <= cache.stored_units
            else:
                self._adopt(cache, known)
            node = known
            self._plan_met(cache, node)
        self.index.pin(node)
        cache.node = node if node.alive else None
        if not node.alive:
            self.index.unpin(node)

    def _plan_met(self, cache: SequenceCache, node: UnitNode) -> None:
        reason = cache.planned.get(node.depth * self.policy.unit_tokens)
        if reason is not None and node.alive:
            self._keep_checkpoint(cache, node, reason)

    def _adopt(self, cache: SequenceCache, node: UnitNode) -> None:
        """Hold the index's rows of a unit that was computed again, not a second copy of them."""
        for spec in self._compressed:
            pool = self.pools[spec.group]
            if cache.growing[spec.group][node.depth - 1] != node.blocks[spec.group]:
                own = cache.growing[spec.group].replace(node.depth - 1, pool.share(node.blocks[spec.group]))
                pool.release(own)

    def _keep_checkpoint(self, cache: SequenceCache, node: UnitNode, reason: CheckpointReason) -> None:
        if node.checkpoint is not None:
            return
        blocks: dict[Group, tuple[int, ...]] = {}
        for spec in self._sliding:
            table = cache.sliding[spec.group]
            numbers = spec.checkpoint_numbers(node.depth * self.policy.unit_tokens)
            if any(number not in table for number in numbers):
                return
            blocks[spec.group] = tuple(table[number] for number in numbers)
        for group, ids in blocks.items():
            for block in ids:
                self.pools[group].keep(block)
        self.index.set_checkpoint(node, blocks, reason, self.saved_tokens(node))
        self.checkpoints_made[reason] += 1
        self.fresh_checkpoints.append(node)

    def saved_tokens(self, node: UnitNode) -> int:
        """What a checkpoint after this unit saves: the way from the one before it, or a replay."""
        unit, above = self.policy.unit_tokens, node.parent
        for _ in range(self.policy.replay_tokens // unit or node.depth):
            if above is None or above.parent is None or above.checkpoint is not None:
                break
            above = above.parent
        return self.policy.saved_tokens(node.depth * unit, above.depth * unit if above is not None else 0)

    # -- eviction ---------------------------------------------------------------------------------------------

    def _make_room(self, wanted: Mapping[Group, int]) -> bool:
        """Evict until every pool has the wanted number of free blocks; False, with nothing evicted, if one cannot."""
        pools = self.pools
        if all(pools[group].free_blocks >= count for group, count in wanted.items()):
            return True
        if any(pools[group].free_blocks + pools[group].idle_blocks < count for group, count in wanted.items()):
            return False
        for spec in [s for s in self.groups if s.group in wanted]:
            evict = self._evict_unit if spec.compressed else self._evict_checkpoint
            while pools[spec.group].free_blocks < wanted[spec.group]:
                if not evict(spec.group):
                    return False
        return True

    def _evict_unit(self, group: Group) -> bool:
        pool = self.pools[group]
        node = self.index.evict_unit(lambda n: pool.is_idle(n.blocks[group]))
        if node is None:
            return False
        self._drop_unit(node)
        self.evicted[group] += 1
        return True

    def _evict_checkpoint(self, group: Group) -> bool:
        pool = self.pools[group]

        def frees_a_block(node: UnitNode) -> bool:
            return node.checkpoint is not None and any(pool.is_idle(b) for b in node.checkpoint[group])

        blocks = self.index.evict_checkpoint(frees_a_block)
        if blocks is None:
            return False
        self._drop_checkpoint(blocks)
        self.evicted[group] += 1
        return True

    def _drop_unit(self, node: UnitNode) -> None:
        for group, block in node.blocks.items():
            self.pools[group].drop(block)
        if node.checkpoint is not None:
            self._drop_checkpoint(node.checkpoint)
            node.checkpoint = None

    def _drop_checkpoint(self, blocks: Blocks) -> None:
        for group, ids in blocks.items():
            for block in ids:
                self.pools[group].drop(block)

    def reset(self) -> int:
        """Forget every cached prefix; running requests keep what they hold. Returns the tokens forgotten."""
        count = 0
        for node in self.index.clear():
            self._drop_unit(node)
            count += 1
        return count * self.policy.unit_tokens

    # -- reports ----------------------------------------------------------------------------------------------

    @property
    def evicted_units(self) -> int:
        return sum(self.evicted[spec.group] for spec in self._compressed)

    @property
    def evicted_checkpoints(self) -> int:
        return sum(self.evicted[spec.group] for spec in self._sliding)

    def usage(self) -> tuple[GroupUsage, ...]:
        return tuple(
            GroupUsage(g.value, p.total_blocks, p.free_blocks, p.cached_blocks, p.idle_blocks)
            for g, p in self.pools.items()
        )

    def check(self) -> None:
        """Conservation: every reference is a running request's or the index's. Raises AssertionError."""
        expected = {group: [0] * pool.total_blocks for group, pool in self.pools.items()}
        for cache in self._running:
            for group, block in cache.blocks():
                expected[group][block] += 1
        for (group, block), count in self._held.items():
            expected[group][block] += count
        for node in self.index.units():
            held = [(group, (block,)) for group, block in node.blocks.items()]
            for group, ids in (*held, *(node.checkpoint or {}).items()):
                for block in ids:
                    expected[group][block] += 1
        for group, pool in self.pools.items():
            pool.check()
            assert pool.references() == expected[group], f"references of group {group} do not add up"
