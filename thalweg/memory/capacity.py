"""How many blocks each pool gets from a byte budget, and how many sequences of a length then fit. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thalweg.cache.geometry import CacheGroupSpec, Group
from thalweg.cache.policy import CHECKPOINT_SPACING_UNITS
from thalweg.config.model import UNIT_TOKENS
from thalweg.errors import ConfigError
from thalweg.memory.layout import CacheLayout


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Pool sizes in blocks, and what they hold. Sums of block_bytes * pool_blocks are what the arena allocates."""

    groups: tuple[CacheGroupSpec, ...]
    layout: CacheLayout
    pool_blocks: Mapping[Group, int]
    max_running: int

    @property
    def total_bytes(self) -> int:
        return sum(self.layout.block_bytes(spec) * self.pool_blocks[spec.group] for spec in self.groups)

    @property
    def token_capacity(self) -> int:
        """Tokens of context that the compressed pools hold, over all sequences."""
        compressed = [s for s in self.groups if s.compressed]
        if not compressed:
            return 2**40  # window layers only: the context costs nothing
        return min(self.pool_blocks[s.group] * s.tokens_per_block for s in compressed)

    def sequences_of(self, tokens: int) -> int:
        """How many sequences of `tokens` tokens can run at once."""
        unit = max((s.tokens_per_block for s in self.groups if s.compressed), default=1)
        return min(self.max_running, self.token_capacity // (-(-tokens // unit) * unit))


def live_blocks(spec: CacheGroupSpec) -> int:
    """Blocks of a sliding group that one running request may hold at once, in the middle of a step.

    Before the step: the current block, those behind it, and in a group of finer blocks than a unit also those of the
    last boundary's checkpoint; the step may write as many new ones before it lets the old ones go.
    """
    assert spec.blocks_behind is not None, "compressed groups have no fixed number of live blocks"
    boundary = spec.blocks_behind if spec.tokens_per_block < UNIT_TOKENS else 0
    return 2 * (spec.blocks_behind + 1 + boundary)


def request_bytes(groups: tuple[CacheGroupSpec, ...], layout: CacheLayout) -> int:
    """Fixed bytes that each running request needs beside its compressed rows."""
    return sum(live_bytes(spec, layout) for spec in groups)


def live_bytes(spec: CacheGroupSpec, layout: CacheLayout) -> int:
    """A group's share of `request_bytes`; 0 for compressed groups."""
    return 0 if spec.compressed else live_blocks(spec) * layout.block_bytes(spec)


def checkpoint_blocks(spec: CacheGroupSpec) -> int:
    """Blocks of a group that one checkpoint keeps: what lies behind a unit boundary."""
    return spec.blocks_behind or 0


def checkpoint_bytes(groups: tuple[CacheGroupSpec, ...], layout: CacheLayout) -> int:
    """Bytes of one checkpoint: window and tail state of all layers at a unit boundary."""
    return sum(checkpoint_blocks(s) * layout.block_bytes(s) for s in groups if not s.compressed)


def unit_bytes(groups: tuple[CacheGroupSpec, ...], layout: CacheLayout) -> int:
    """Bytes of the compressed rows of one unit of tokens."""
    return sum(layout.block_bytes(s) for s in groups if s.compressed)


def sequences_that_fit(
    groups: tuple[CacheGroupSpec, ...],
    layout: CacheLayout,
    *,
    budget_bytes: int,
    tokens: int,
    prefix_caching: bool = True,
) -> int:
    """How many sequences of `tokens` tokens a plan for that many running requests holds at once."""
    covered = max((s.tokens_per_block for s in groups if s.compressed), default=1)
    units = -(-tokens // covered)
    each = request_bytes(groups, layout) + units * unit_bytes(groups, layout)
    if not prefix_caching:
        return budget_bytes // each
    spacing = CHECKPOINT_SPACING_UNITS
    checkpoints = max(2 * spacing, units) * checkpoint_bytes(groups, layout)  # of `spacing` sequences
    return budget_bytes * spacing // (each * spacing + checkpoints)


def plan_cache(
    groups: tuple[CacheGroupSpec, ...],
    layout: CacheLayout,
    *,
    budget_bytes: int,
    max_running: int,
    spacing_units: int = CHECKPOINT_SPACING_UNITS,
) -> CachePlan:
    """Divide a byte budget over the pools. Raises ConfigError if not even one unit per request fits.

    First the fixed state of `max_running` requests, then compressed units, with one checkpoint per `spacing_units` of
    them and at least two per running request; 0 is for policies that keep no checkpoints.
    """
    fixed = max_running * request_bytes(groups, layout)
    unit, checkpoint = unit_bytes(groups, layout), checkpoint_bytes(groups, layout)
    least_checkpoints = 2 * max_running if spacing_units else 0
    left = budget_bytes - fixed - least_checkpoints * checkpoint
    if left < unit * max_running:
        need = fixed + least_checkpoints * checkpoint + unit * max_running
        raise ConfigError(
            f"kv_cache_memory: {budget_bytes:,} bytes are too few for max_num_seqs={max_running}: its window and "
            f"compressor state and one unit of context each need {need:,} bytes",
            param="kv_cache_memory",
        )
    share = checkpoint / spacing_units if spacing_units else 0.0
    units = int((left + least_checkpoints * checkpoint) // (unit + share)) if unit else 0
    checkpoints = max(least_checkpoints, units // spacing_units) if spacing_units else 0
    if unit:
        units = (budget_bytes - fixed - checkpoints * checkpoint) // unit
    blocks = {
        s.group: units if s.compressed else max_running * live_blocks(s) + checkpoints * checkpoint_blocks(s)
        for s in groups
    }
    return CachePlan(groups, layout, blocks, max_running)
