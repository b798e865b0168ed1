"""The logical shape of a sequence's state: which groups of rows exist and which tokens a block of each covers.

Every group is a paged sequence of rows by token position. A block covers `tokens_per_block` tokens; the state at
position p needs, of each group, the blocks from `blocks_behind` before p's own block on (all of them where it is None).
At a unit boundary a checkpoint is therefore one `window` block and one `tail` block; `pending` is empty there.
Bytes are not known here: memory/layout.py packs rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from thalweg.config.model import LayerKind, ModelConfig


class Group(StrEnum):
    """The cache groups. `tail` and `pending` together are the compressors' state."""

    WINDOW = "window"  # one KV row per token and layer; the last `window` tokens are needed
    CSA = "csa"  # one compressed KV row per csa_ratio tokens, CSA layers
    INDEX = "index"  # one index key per csa_ratio tokens, CSA layers
    HCA = "hca"  # one compressed KV row per hca_ratio tokens, HCA layers
    TAIL = "tail"  # what the next CSA entry needs of the previous csa_ratio tokens
    PENDING = "pending"  # tokens of compression windows that are still open


class RowKind(StrEnum):
    """How the rows of a stream may be stored: KV entries, index keys, or raw fp32 compressor state."""

    KV = "kv"
    INDEX = "index"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """Rows of one kind in a group, for each of `layers`. `width` is in elements."""

    name: str
    kind: RowKind
    layers: tuple[int, ...]
    tokens_per_row: int
    rows_per_block: int
    width: int


@dataclass(frozen=True, slots=True)
class CacheGroupSpec:
    """One group: its paging and its streams. `blocks_behind` None means that no block is ever let go."""

    group: Group
    tokens_per_block: int
    blocks_behind: int | None
    streams: tuple[StreamSpec, ...]

    @property
    def compressed(self) -> bool:
        """True for the groups that grow with the context and are shared by unit."""
        return self.blocks_behind is None

    def first_live_block(self, position: int) -> int:
        """The oldest block that computing the token at `position` may read."""
        if self.blocks_behind is None:
            return 0
        return max(0, position // self.tokens_per_block - self.blocks_behind)

    def live_numbers(self, end: int) -> range:
        """Block numbers needed to go on after the token before `end`."""
        return range(self.first_live_block(end), -(-end // self.tokens_per_block))

    def needed_numbers(self, end: int, boundary: int | None) -> set[int]:
        """The same, with those of a checkpoint at a boundary."""
        size, behind = self.tokens_per_block, self.blocks_behind or 0
        numbers = set(range(max(0, end // size - behind), -(-end // size)))
        if boundary is not None:
            numbers.update(range(max(0, boundary // size - behind), boundary // size))
        return numbers

    def checkpoint_numbers(self, boundary: int) -> range:
        """Block numbers of a sliding group that a checkpoint at a unit boundary consists of."""
        return range(self.first_live_block(boundary), boundary // self.tokens_per_block)


def _compressed(group: Group, unit: int, ratio: int, stream: tuple[RowKind, tuple[int, ...], int]) -> CacheGroupSpec:
    kind, layers, width = stream
    return CacheGroupSpec(group, unit, None, (StreamSpec(group.value, kind, layers, ratio, unit // ratio, width),))


def cache_groups(config: ModelConfig) -> tuple[CacheGroupSpec, ...]:
    """The groups that a model needs, in a fixed order; groups without a layer are left out."""
    unit, ratio, wide = config.unit_tokens, config.csa_ratio, config.hca_ratio
    csa, hca = config.layers_of(LayerKind.CSA), config.layers_of(LayerKind.HCA)
    every = tuple(range(config.num_layers))
    window = StreamSpec("window", RowKind.KV, every, 1, unit, config.head_dim)
    groups = [CacheGroupSpec(Group.WINDOW, unit, -(-config.window // unit), (window,))]
    pending = []
    if csa:
        groups.append(_compressed(Group.CSA, unit, ratio, (RowKind.KV, csa, config.head_dim)))
        groups.append(_compressed(Group.INDEX, unit, ratio, (RowKind.INDEX, csa, config.index_head_dim)))
        pending.append(StreamSpec("pending_csa", RowKind.STATE, csa, 1, ratio, 2 * config.head_dim))
        pending.append(StreamSpec("pending_index", RowKind.STATE, csa, 1, ratio, 2 * config.index_head_dim))
    if hca:
        groups.append(_compressed(Group.HCA, unit, wide, (RowKind.KV, hca, config.head_dim)))
        pending.append(StreamSpec("pending_hca", RowKind.STATE, hca, 1, wide, 2 * config.head_dim))
    if csa:
        tail = (
            StreamSpec("tail_csa", RowKind.STATE, csa, 1, ratio, 2 * config.head_dim),
            StreamSpec("tail_index", RowKind.STATE, csa, 1, ratio, 2 * config.index_head_dim),
        )
        groups.append(CacheGroupSpec(Group.TAIL, ratio, 1, tail))
    if pending:
        groups.append(CacheGroupSpec(Group.PENDING, unit, 0, tuple(pending)))
    return tuple(groups)
