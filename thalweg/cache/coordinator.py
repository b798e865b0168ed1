"""The cache as the scheduler sees it: attach a prefix, reserve room for a step, commit it, release.

All groups move together: a prefix is attached for every group at one resume point or not at all, and a step's blocks
are reserved in every pool or in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.cache.policy import CheckpointPolicy
from thalweg.cache.pool import BlockPool
from thalweg.cache.prefix_index import Blocks, Match, PrefixIndex, UnitNode
from thalweg.cache.tables import GrowingTable, SlidingTable
from thalweg.types import CacheReport, MissReason, TokenArray


class SequenceCache:
    """The blocks that one running request holds. Tokens below `computed_tokens` are in them."""

    def __init__(self, report: CacheReport, node: UnitNode | None, chosen: frozenset[int], target: int) -> None:
        self.report = report
        self.computed_tokens = report.cached_tokens
        self.target_tokens = target  # tokens known at admission: room for them is promised
        self.growing: dict[Group, GrowingTable] = {}
        self.sliding: dict[Group, SlidingTable] = {}
        self.node = node  # the unit of the index this request stands on; None where it does not publish
        self.chosen = chosen
        self.planned: tuple[int, ...] = ()  # checkpoints that the step under way will keep

    def blocks(self) -> Iterator[tuple[Group, int]]:
        """Every block held, with its group."""
        for group, growing in self.growing.items():
            yield from ((group, block) for block in growing.blocks())
        for group, sliding in self.sliding.items():
            yield from ((group, block) for block in sliding.blocks())


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """A snapshot of one pool, in blocks."""

    group: str
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    idle_blocks: int


class Coordinator:
    """Pools of all groups and the prefix index over them. Not thread-safe: the engine thread owns it."""

    def __init__(
        self,
        groups: tuple[CacheGroupSpec, ...],
        pool_blocks: Mapping[Group, int],
        policy: CheckpointPolicy,
        *,
        prefix_caching: bool = True,
    ) -> None:
        self.groups = groups
        self.policy = policy
        self.prefix_caching = prefix_caching
        self.pools = {spec.group: BlockPool(pool_blocks[spec.group]) for spec in groups}
        self.index = PrefixIndex(policy.unit_tokens)
        self._compressed = tuple(s for s in groups if s.compressed)
        self._sliding = tuple(s for s in groups if not s.compressed)
        self._running: set[SequenceCache] = set()
        self.evicted_units = 0
        self.evicted_checkpoints = 0

    # -- attaching --------------------------------------------------------------------------------------------

    def probe(self, tokens: TokenArray, namespace: bytes) -> Match:
        """How far `tokens` is cached. Changes nothing. At least one token is always left to compute."""
        return self.index.match(namespace, tokens, (len(tokens) - 1) // self.policy.unit_tokens)

    def attach(self, tokens: TokenArray, namespace: bytes, hints: Iterable[int] = ()) -> SequenceCache | None:
        """Start a request on its longest resumable prefix, or None if the pools cannot promise room for its tokens."""
        match = self.probe(tokens, namespace) if self.prefix_caching else Match((), 0, 0, False)
        if not self._room_for(match, len(tokens)):
            return None
        unit = self.policy.unit_tokens
        divergence = len(match.path) * unit if len(match.path) > match.resume else 0
        chosen = self.policy.of_prompt(len(tokens), hints, divergence)
        reason, divergence_token = self._explain(match, len(tokens), namespace)
        report = CacheReport(match.resume * unit, reason=reason, divergence_token=divergence_token)
        attached = match.path[: match.resume]
        node = None
        if self.prefix_caching:
            node = attached[-1] if attached else self.index.root(namespace)
            self.index.pin(node)
            self.index.touch(match.path)
        cache = SequenceCache(report, node, chosen, len(tokens))
        self._share(cache, attached)
        self._running.add(cache)
        return cache

    def _share(self, cache: SequenceCache, attached: tuple[UnitNode, ...]) -> None:
        """Give a new request the rows of the attached units and the checkpoint of the last of them."""
        for spec in self._compressed:
            table = cache.growing[spec.group] = GrowingTable()
            for unit_node in attached:
                table.append(self.pools[spec.group].share(unit_node.blocks[spec.group]))
        for spec in self._sliding:
            sliding = cache.sliding[spec.group] = SlidingTable()
            if attached:
                checkpoint = attached[-1].checkpoint
                assert checkpoint is not None, "resumed at a unit without a checkpoint"
                numbers = self._checkpoint_numbers(spec, cache.computed_tokens)
                for number, block in zip(numbers, checkpoint[spec.group], strict=True):
                    sliding.put(number, self.pools[spec.group].share(block))

    def _room_for(self, match: Match, tokens: int) -> bool:
        """True if every known token of this request fits beside what running requests were promised."""
        for spec in self._compressed:
            pool = self.pools[spec.group]
            promised = sum(
                max(0, -(-c.target_tokens // spec.tokens_per_block) - len(c.growing[spec.group])) for c in self._running
            )
            attached = [node.blocks[spec.group] for node in match.path[: match.resume]]
            idle = pool.idle_blocks - sum(pool.is_idle(block) for block in attached)
            if -(-tokens // spec.tokens_per_block) - len(attached) > pool.free_blocks + idle - promised:
                return False
        return True

    def _explain(self, match: Match, tokens: int, namespace: bytes) -> tuple[MissReason, int | None]:
        limit = (tokens - 1) // self.policy.unit_tokens
        if not self.prefix_caching:
            return MissReason.DISABLED, None
        if limit == 0:
            return MissReason.TOO_SHORT, None
        if match.resume == limit:
            return MissReason.NONE, None
        if match.next_was_evicted:
            return MissReason.EVICTED, None
        if len(match.path) > match.resume:
            return MissReason.NO_CHECKPOINT, match.common_tokens
        last = match.path[-1] if match.path else self.index.root(namespace)
        if not last.children:
            return (MissReason.NONE if match.path else MissReason.COLD), None
        return MissReason.DIVERGED, match.common_tokens

    # -- steps ------------------------------------------------------------------------------------------------

    def reserve(self, cache: SequenceCache, end: int) -> bool:
        """Blocks for computing tokens up to `end`: in all pools, or in none and False. May evict idle blocks."""
        planned = self.policy.wanted(cache.chosen, cache.computed_tokens, end) if cache.node is not None else ()
        wanted = self._wanted(cache, end, planned)
        if not self._make_room(wanted):
            planned = ()  # checkpoints are a wish, the step itself is not
            wanted = self._wanted(cache, end, planned)
            if not self._make_room(wanted):
                return False
        for spec in self.groups:
            for number in wanted[spec.group]:
                block = self.pools[spec.group].allocate()
                if spec.compressed:
                    cache.growing[spec.group].append(block)
                else:
                    cache.sliding[spec.group].put(number, block)
        cache.planned = planned
        return True

    def commit(self, cache: SequenceCache, tokens: TokenArray, end: int) -> None:
        """Tokens up to `end` are in the blocks: publish finished units and let go of what is not needed any more."""
        cache.computed_tokens = end
        self._publish(cache, tokens)
        cache.planned = ()
        for spec in self._sliding:
            table = cache.sliding[spec.group]
            keep = set(self._live_numbers(spec, end, cache.node is not None))
            for number in table.numbers():
                if number not in keep:
                    self.pools[spec.group].release(table.pop(number))

    def release(self, cache: SequenceCache, *, keep_state: bool) -> None:
        """End a request. With `keep_state` the last boundary it passed gets a checkpoint (end of output)."""
        boundary = self.policy.boundary(cache.computed_tokens)
        node = cache.node
        if keep_state and node is not None and node.alive and 0 < boundary == node.depth * self.policy.unit_tokens:
            self._keep_checkpoint(cache, node)
        if node is not None:
            self.index.unpin(node)
        for group, block in cache.blocks():
            self.pools[group].release(block)
        self._running.remove(cache)

    def _wanted(self, cache: SequenceCache, end: int, planned: tuple[int, ...]) -> dict[Group, list[int]]:
        """Block numbers that the step to `end` writes and the request does not hold yet."""
        wanted = {}
        for spec in self.groups:
            size = spec.tokens_per_block
            if spec.compressed:
                wanted[spec.group] = list(range(len(cache.growing[spec.group]), -(-end // size)))
                continue
            numbers = set(self._live_numbers(spec, end, cache.node is not None))
            numbers.update(n for p in planned for n in self._checkpoint_numbers(spec, p))
            first = cache.computed_tokens // size
            held = cache.sliding[spec.group]
            wanted[spec.group] = sorted(n for n in numbers if n >= first and n not in held)
        return wanted

    def _checkpoint_numbers(self, spec: CacheGroupSpec, boundary: int) -> range:
        """Block numbers of a sliding group that a checkpoint at a unit boundary consists of."""
        return range(spec.first_live_block(boundary), boundary // spec.tokens_per_block)

    def _live_numbers(self, spec: CacheGroupSpec, end: int, publishing: bool) -> list[int]:
        """Block numbers needed after a step to `end`: to go on, and to checkpoint the last boundary if it ends here."""
        numbers = list(range(spec.first_live_block(end), -(-end // spec.tokens_per_block)))
        if publishing:
            numbers += self._checkpoint_numbers(spec, self.policy.boundary(end))
        return numbers

    def _publish(self, cache: SequenceCache, tokens: TokenArray) -> None:
        """Walk or extend the index to the last complete unit; attach the planned checkpoints on the way."""
        node = cache.node
        if node is None:
            return
        unit = self.policy.unit_tokens
        self.index.unpin(node)
        while node.alive and (node.depth + 1) * unit <= cache.computed_tokens:
            known = self.index.child(node, tokens)
            if known is None:
                blocks = {s.group: cache.growing[s.group][node.depth] for s in self._compressed}
                for group, block in blocks.items():
                    self.pools[group].keep(block)
                known = self.index.insert(node, tokens, blocks)
            else:
                self._adopt(cache, known)
            node = known
            if node.depth * unit in cache.planned:
                self._keep_checkpoint(cache, node)
        self.index.pin(node)
        cache.node = node if node.alive else None
        if not node.alive:
            self.index.unpin(node)

    def _adopt(self, cache: SequenceCache, node: UnitNode) -> None:
        """Hold the index's rows of a unit that was computed again, not a second copy of them."""
        for spec in self._compressed:
            pool = self.pools[spec.group]
            if cache.growing[spec.group][node.depth - 1] != node.blocks[spec.group]:
                own = cache.growing[spec.group].replace(node.depth - 1, pool.share(node.blocks[spec.group]))
                pool.release(own)

    def _keep_checkpoint(self, cache: SequenceCache, node: UnitNode) -> None:
        if node.checkpoint is not None:
            return
        blocks: dict[Group, tuple[int, ...]] = {}
        for spec in self._sliding:
            table = cache.sliding[spec.group]
            numbers = self._checkpoint_numbers(spec, node.depth * self.policy.unit_tokens)
            if any(number not in table for number in numbers):
                return
            blocks[spec.group] = tuple(table[number] for number in numbers)
        for group, ids in blocks.items():
            for block in ids:
                self.pools[group].keep(block)
        self.index.set_checkpoint(node, blocks)

    # -- eviction ---------------------------------------------------------------------------------------------

    def _make_room(self, wanted: Mapping[Group, list[int]]) -> bool:
        """Evict until every pool has the wanted number of free blocks; False, with nothing evicted, if one cannot."""
        if any(p.free_blocks + p.idle_blocks < len(wanted[g]) for g, p in self.pools.items()):
            return False
        for spec in self.groups:
            evict = self._evict_unit if spec.compressed else self._evict_checkpoint
            while self.pools[spec.group].free_blocks < len(wanted[spec.group]):
                if not evict(spec.group):
                    return False
        return True

    def _evict_unit(self, group: Group) -> bool:
        pool = self.pools[group]
        node = self.index.evict_unit(lambda n: pool.is_idle(n.blocks[group]))
        if node is None:
            return False
        self._drop_unit(node)
        self.evicted_units += 1
        return True

    def _evict_checkpoint(self, group: Group) -> bool:
        pool = self.pools[group]

        def frees_a_block(node: UnitNode) -> bool:
            return node.checkpoint is not None and any(pool.is_idle(b) for b in node.checkpoint[group])

        blocks = self.index.evict_checkpoint(frees_a_block)
        if blocks is None:
            return False
        self._drop_checkpoint(blocks)
        self.evicted_checkpoints += 1
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
        for node in self.index.units():
            held = [(group, (block,)) for group, block in node.blocks.items()]
            for group, ids in (*held, *(node.checkpoint or {}).items()):
                for block in ids:
                    expected[group][block] += 1
        for group, pool in self.pools.items():
            pool.check()
            assert pool.references().tolist() == expected[group], f"references of group {group} do not add up"
