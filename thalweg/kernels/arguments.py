"""Values that the ops take beside plain tensors: which rows belong to which sequence, and where cached rows lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Sequences in a flat batch: s owns rows offsets[s] to offsets[s+1]; the first of them is at position starts[s]."""

    offsets: tuple[int, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Cached rows of one stream and layer. `rows` [slots, width]; sequence s has the blocks
    blocks[offsets[s]:offsets[s+1]] (int64), in token order; block b holds slots b*rows_per_block onwards."""

    rows: Tensor
    blocks: Tensor
    offsets: tuple[int, ...]
    rows_per_block: int


@dataclass(frozen=True, slots=True)
class PastRows:
    """Cached rows by slot: sequence s reads rows[slots[offsets[s]:offsets[s+1]]], oldest first (slots int64)."""

    rows: Tensor
    slots: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the queries of a layer may see. `queries` and `keys` list the same sequences: the rows with queries, and all
    new rows; `past` are the window rows from before the step; `entries` the layer's compressed rows, one per `ratio`
    tokens, None in a window layer. A query at position t sees window rows t-window+1 to t, entries below (t+1)//ratio.
    """

    queries: Segments
    keys: Segments
    past: PastRows
    entries: PagedRows | None
    ratio: int
    window: int
