"""What one forward pass is told: tokens, positions and where to read and write each cache stream.

Built from a step plan by engine/batch.py, the one place where token positions become slots. All index tensors are
int64, on the model's device as the model computes. T new tokens of B sequences, E compressed entries completed by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.kernels.arguments import Ints, Segments


class CacheRows(Protocol):
    """The rows of a cache stream in one layer, as a view that ops read and write: [slots, width] of a float dtype, or
    uint8 [slots, bytes of a row] where the stream's format is packed."""

    def rows(self, stream: str, layer: int) -> Tensor: ...


def picked(rows: Tensor, which: Tensor) -> Tensor:
    """Rows of a batch, each at most once and in order: as many as there are are all of them."""
    return rows if len(which) == len(rows) else rows[which]


@dataclass(frozen=True, slots=True)
class RowWrites:
    """Copy batch (or entry) row `source[i]` to slot `slots[i]` of a stream."""

    source: Tensor
    slots: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """The rows to write."""
        return picked(rows, self.source)


@dataclass(frozen=True, slots=True)
class BlockLists:
    """Block ids of a compressed group, all sequences one after another; sequence s has ids[offsets[s]:offsets[s+1]]."""

    ids: Tensor
    offsets: Ints
    rows_per_block: int


@dataclass(frozen=True, slots=True)
class CompressorInputs:
    """One step of all compressors of one ratio m, the whole batch at once. Cached rows are only read for sequences that
    complete an entry.

    own [E, m] indexes cat(pending rows read from `pending_slots`, the T new rows): the tokens of each entry.
    previous [E, m] indexes cat(tail rows read from `tail_slots`, the T new rows): the tokens of the window before
    (overlapping compressors only; -1 where there is none). positions [E]: each entry's first own token.
    entries maps a stream name ("csa", "index", "hca") to the slots [E] that the entries go to.
    """

    ratio: int
    pending_slots: Tensor
    own: Tensor
    positions: Tensor
    entries: Mapping[str, Tensor]
    pending_writes: RowWrites
    tail_slots: Tensor | None = None
    previous: Tensor | None = None
    tail_writes: RowWrites | None = None


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One forward pass. token_ids, positions [T]; output_rows [O]: the batch rows whose logits are wanted, of each
    sequence none or its last ones, and `output_segments` the same rows as sequences of their own.

    Sequence s reads window rows of its last min(start, window-1) tokens before this step at
    past_slots[past_offsets[s]:past_offsets[s+1]], oldest first.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Segments
    output_rows: Tensor
    output_segments: Segments
    past_slots: Tensor
    past_offsets: Ints
    window_writes: RowWrites
    blocks: Mapping[str, BlockLists]  # by stream name: "csa", "index", "hca"
    csa: CompressorInputs | None
    hca: CompressorInputs | None
