"""The blocks of one running request, and how far they are filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.cache.policy import CheckpointReason, Resume
from thalweg.cache.pool import BlockPool
from thalweg.cache.prefix_index import UnitNode
from thalweg.cache.tables import GrowingTable, SlidingTable
from thalweg.types import CacheReport

_NONE = range(0)


class SequenceCache:
    """The blocks that one running request holds. Tokens below `computed_tokens` are in them.

    Window and compressor state exists from `state_from` on; compressed rows before `rows_from` are the index's and are
    not written again, even where a replay computes their tokens.
    """

    def __init__(
        self,
        report: CacheReport,
        resume: Resume,
        node: UnitNode | None,
        chosen: Mapping[int, CheckpointReason],
        *,
        rows_from: int,
        target_tokens: int,
    ) -> None:
        self.report = report
        self.computed_tokens = resume.start
        self.state_from = resume.start if resume.replayed else 0
        self.rows_from = rows_from
        self.target_tokens = target_tokens  # tokens known at admission: room for them is promised
        self.growing: dict[Group, GrowingTable] = {}
        self.sliding: dict[Group, SlidingTable] = {}
        self.node = node  # the unit of the index this request stands on; None where it does not publish
        self.chosen = chosen
        self.planned: Mapping[int, CheckpointReason] = {}  # checkpoints that the step under way will keep
        self.quiet_until = 0  # steps of one token up to here concern no pool and no index
        self._alone = False  # the step begun concerns no index, and pools only as far as they have free blocks
        self._kept: dict[Group, range] = {}  # numbers of the last boundary's checkpoint, as long as steps are quiet
        self.stored_units = 0  # leading units that a lower tier is known to hold
        self.offered_units = 0  # leading units that were offered to lower tiers

    def blocks(self) -> Iterator[tuple[Group, int]]:
        """Every block held, with its group."""
        for group, growing in self.growing.items():
            yield from ((group, block) for block in growing.blocks())
        for group, sliding in self.sliding.items():
            yield from ((group, block) for block in sliding.blocks())

    def release(self, pools: Mapping[Group, BlockPool]) -> None:
        """Give every block back."""
        for tables in (self.growing, self.sliding):
            for group, table in tables.items():
                release = pools[group].release
                for block in table.blocks():
                    release(block)

    def wanted(
        self, groups: Iterable[CacheGroupSpec], end: int, boundary: int | None, planned: Iterable[int]
    ) -> dict[Group, Sequence[int]]:
        """Block numbers that a step to `end` writes and that are not held yet: to go on after it, and for checkpoints
        at the last boundary before it and at those planned."""
        wanted: dict[Group, Sequence[int]] = {}
        for spec in groups:
            size, group = spec.tokens_per_block, spec.group
            if spec.compressed:
                wanted[group] = range(len(self.growing[group]), -(-end // size))
                continue
            numbers = spec.needed_numbers(end, boundary)
            for place in planned:
                numbers.update(spec.checkpoint_numbers(place))
            first, held = self.computed_tokens // size, self.sliding[group]
            wanted[group] = [n for n in sorted(numbers) if n >= first and n not in held]
        return wanted

    def settle(self, unit: int, pools: Mapping[Group, BlockPool]) -> None:
        """Find how far steps of one token concern this request's own tables alone."""
        position, node = self.computed_tokens, self.node
        end = position - position % unit + unit
        self._kept = {}
        self.quiet_until = position
        if node is not None and node.depth * unit > position:
            return  # a replay, which ends on a unit that is known
        for growing in self.growing.values():
            if len(growing) * unit <= position:
                return
        until = end - 1
        for group, table in self.sliding.items():
            kept = self._kept[group] = table.kept(end - unit) if node is not None else _NONE
            until = min(until, table.quiet_until(position, end, kept, pools[group].is_sole))
        self.quiet_until = until

    def begins_alone(self, end: int, unit: int, pools: Mapping[Group, BlockPool]) -> bool:
        """Take blocks for a step of one token that neither ends a unit nor evicts anything. False: it is none."""
        position, self._alone = self.computed_tokens, False
        if end != position + 1:
            self.quiet_until = 0
            return False
        if self.quiet_until < end:
            self.settle(unit, pools)
        if self.quiet_until >= end:
            for own in self.sliding.values():
                own.begin_quiet(position)
            return True
        if end % unit == 0 or (self.node is not None and self.node.depth * unit > position):
            return False
        growing = [group for group, table in self.growing.items() if len(table) * unit <= position]
        sliding = [group for group, table in self.sliding.items() if table.lacks(position)]
        self._alone = all(pools[group].free_blocks for group in (*growing, *sliding))
        if self._alone:
            for group in growing:
                self.growing[group].append(pools[group].allocate())
            for group, table in self.sliding.items():
                kept = table.kept(position - position % unit) if self.node is not None else _NONE
                table.begin(position, kept, pools[group])
        return self._alone

    def ends_alone(self, end: int, unit: int, pools: Mapping[Group, BlockPool]) -> bool:
        """Let blocks go after a step that began alone."""
        if end <= self.quiet_until:
            self.computed_tokens = end
            for group, table in self.sliding.items():
                table.end_quiet(end, self._kept[group])
            return True
        if self._alone:
            self.computed_tokens = end
            for group, table in self.sliding.items():
                kept = table.kept(end - end % unit) if self.node is not None else _NONE
                table.end(end, kept, pools[group])
            self.planned = {}
            self.settle(unit, pools)
        return self._alone

    def advance(self, end: int) -> None:
        """What so many quiet steps up to `end` do, at once."""
        for group, table in self.sliding.items():
            table.advance(self.computed_tokens, end, self._kept[group])
        self.computed_tokens = end

    def snapshot(self) -> Snapshot:
        """What must be moved to go on elsewhere or later without recomputing."""
        numbers = {group: tuple(range(len(table))) for group, table in self.growing.items()}
        numbers |= {group: table.numbers() for group, table in self.sliding.items()}
        blocks = {
            g: tuple(self.growing[g].blocks() if g in self.growing else (self.sliding[g][n] for n in numbers[g]))
            for g in numbers
        }
        return Snapshot(
            self.computed_tokens, self.state_from, self.rows_from, self.target_tokens, self.chosen, numbers, blocks
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A running request's place, with the block numbers that it holds in each group and the blocks at these numbers."""

    computed_tokens: int
    state_from: int
    rows_from: int
    target_tokens: int
    chosen: Mapping[int, CheckpointReason]
    numbers: Mapping[Group, tuple[int, ...]]
    blocks: Mapping[Group, tuple[int, ...]]
