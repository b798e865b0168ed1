"""Attention over tiles that lie at fixed positions: what a query sees is always cut in the same way.

Queries go by tiles of QUERY_TILE positions counted from the start of the sequence, with all window rows that such a
tile can see; dense entries go by tiles counted from the first entry. A row that is absent or invisible is zero or
masked, and adds an exact zero. Selected entries differ from query to query: their products are one query each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import AttentionContext, PagedRows
from thalweg.kernels.deterministic.linear import VECTOR, each_product, padded, product
from thalweg.kernels.reference.paging import entry_slots
from thalweg.kernels.reference.rows import read_rows

QUERY_TILE = 32
ENTRY_TILE = 256  # dense (HCA) entries taken in at once; a short history pays for all of them
Product = Callable[[Tensor, Tensor], Tensor]


class _Softmax:
    """Online softmax for queries [q, H, d], padded; `sink` enters the denominator only."""

    def __init__(self, query: Tensor, sinks: Tensor) -> None:
        self.query = query
        self.maximum = sinks.float().expand(query.shape[:2])
        self.denominator = torch.ones(query.shape[:2], device=query.device)
        self.total = torch.zeros(query.shape, device=query.device)

    def add(self, rows: Tensor, visible: Tensor, product: Product) -> None:
        """rows fp32 [n, d] for all queries or [q, n, d] per query; visible bool [q, n]; product(x, y) is x @ y^T."""
        logits = product(self.query, rows).masked_fill(~visible.unsqueeze(1), float("-inf"))
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        weights = torch.exp(logits - maximum.unsqueeze(-1))
        faded = torch.exp(self.maximum - maximum)
        self.denominator = self.denominator * faded + weights.sum(-1)
        self.total = self.total * faded.unsqueeze(-1) + product(weights, rows.transpose(-1, -2))
        self.maximum = maximum

    def result(self) -> Tensor:
        return self.total / self.denominator.unsqueeze(-1)


def attention(
    query: Tensor, new_rows: Tensor, context: AttentionContext, sinks: Tensor, selected: Tensor | None
) -> Tensor:
    width = query.shape[-1]
    result = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    query = padded(query.float() * width**-0.5)
    if selected is not None:
        selected = F.pad(selected, (-selected.shape[1] % VECTOR, 0), value=-1)
    for s, start in enumerate(context.queries.starts):
        first, end = context.queries.offsets[s], context.queries.offsets[s + 1]
        window, origin = _window_rows(new_rows, context, s)
        row = first
        while row < end:
            position = start + row - first
            stop = min(end, row + QUERY_TILE - position % QUERY_TILE)
            positions = torch.arange(position, position + stop - row, device=query.device)
            softmax = _Softmax(query[row:stop], sinks)
            _add_window(softmax, window, origin, positions, context.window)
            if context.entries is not None and selected is not None:
                _add_selected(softmax, context.entries, s, selected[row:stop])
            elif context.entries is not None:
                _add_all(softmax, context.entries, s, (positions + 1) // context.ratio)
            result[row:stop] = softmax.result()[..., :width]
            row = stop
    return result


def _window_rows(new_rows: Tensor, context: AttentionContext, s: int) -> tuple[Tensor, int]:
    """The window rows of a sequence that this step can see, fp32, and the position of the first of them."""
    past = context.past
    slots = past.slots[past.offsets[s] : past.offsets[s + 1]]
    new = new_rows[context.keys.offsets[s] : context.keys.offsets[s + 1]]
    return torch.cat([read_rows(past.rows, slots), new.float()]), context.keys.starts[s] - len(slots)


def _entry_rows(entries: PagedRows, s: int, numbers: Tensor) -> Tensor:
    """Rows of entries of a sequence, fp32 and padded."""
    return padded(read_rows(entries.rows, entry_slots(entries, s, numbers)))


def _add_window(softmax: _Softmax, rows: Tensor, origin: int, positions: Tensor, window: int) -> None:
    """The rows at the last positions that the queries' tile, whole, could see."""
    last = (int(positions[0]) // QUERY_TILE + 1) * QUERY_TILE
    count = -(-(QUERY_TILE + window) // VECTOR) * VECTOR
    low, high = max(origin, last - count), min(origin + len(rows), last)
    keys = torch.zeros((count, softmax.query.shape[-1]), device=rows.device)
    keys[low - last + count : high - last + count, : rows.shape[1]] = rows[low - origin : high - origin]
    distance = positions.unsqueeze(1) - torch.arange(last - count, last, device=rows.device)
    visible = (distance >= 0) & (distance < window) & (distance <= positions.unsqueeze(1))
    softmax.add(keys, visible, product)


def _add_selected(softmax: _Softmax, entries: PagedRows, s: int, selected: Tensor) -> None:
    """Unselected columns are masked by value as well: row 0 stands in for them and may be unwritten, NaN."""
    if entries.offsets[s] == entries.offsets[s + 1]:
        return
    visible = selected >= 0
    rows = _entry_rows(entries, s, selected.clamp_min(0)).masked_fill(~visible.unsqueeze(-1), 0.0)
    softmax.add(rows, visible, lambda x, y: each_product(x, y.transpose(1, 2)))


def _add_all(softmax: _Softmax, entries: PagedRows, s: int, visible: Tensor) -> None:
    count = int(visible[-1])
    for begin in range(0, count, ENTRY_TILE):
        numbers = torch.arange(begin, begin + ENTRY_TILE, device=visible.device)
        rows = torch.zeros((ENTRY_TILE, softmax.query.shape[-1]), device=visible.device)
        present = min(ENTRY_TILE, count - begin)
        rows[:present] = _entry_rows(entries, s, numbers[:present])
        softmax.add(rows, numbers < visible.unsqueeze(1), product)
