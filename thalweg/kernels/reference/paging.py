"""From entry numbers of a sequence to slots of its pool."""

from __future__ import annotations

from torch import Tensor

from thalweg.kernels.arguments import PagedRows


def entry_slots(paged: PagedRows, sequence: int, entries: Tensor) -> Tensor:
    """Slots of entries (int64, any shape, none negative) of one sequence."""
    blocks = paged.blocks[paged.offsets[sequence] : paged.offsets[sequence + 1]]
    size = paged.rows_per_block
    return blocks[entries // size] * size + entries % size
