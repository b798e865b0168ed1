"""Attention over window, compressed entries and sink, plain torch.

One softmax, accumulated over tiles: a running maximum, denominator and weighted sum start from the sink and take in
the window, then the entries. Every temporary is bounded by the tiles, however long the context is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import AttentionContext, PagedRows
from thalweg.kernels.reference.paging import entry_slots
from thalweg.kernels.reference.rows import read_rows

QUERY_TILE = 128  # with a window of 128 each tile reads at most 255 window rows
ENTRY_TILE = 1024  # dense (HCA) entries taken in at once
GATHER_ELEMENTS = 1 << 23  # queries x selected x d gathered at once: 32 MiB of fp32


class _Softmax:
    """Online softmax for queries [q, H, d]: `sink` enters the denominator only."""

    def __init__(self, query: Tensor, sinks: Tensor) -> None:
        self.query = query.float() * query.shape[-1] ** -0.5
        shape = query.shape[:2]
        self.maximum = sinks.float().expand(shape).contiguous()
        self.denominator = torch.ones(shape, device=query.device)
        self.total = torch.zeros(query.shape, device=query.device)

    def add(self, rows: Tensor, visible: Tensor) -> None:
        """rows fp32 [n, d] for all queries or [q, n, d] per query; visible bool [q, n]."""
        shared = rows.dim() == 2
        logits = self.query.flatten(0, 1) @ rows.T if shared else torch.bmm(self.query, rows.transpose(1, 2))
        logits = logits.view(*self.query.shape[:2], -1).masked_fill(~visible[:, None, :], float("-inf"))
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        weights = torch.exp(logits - maximum[..., None])
        faded = torch.exp(self.maximum - maximum)
        added = weights.flatten(0, 1) @ rows if shared else torch.bmm(weights, rows)
        self.denominator = self.denominator * faded + weights.sum(-1)
        self.total = self.total * faded[..., None] + added.view_as(self.total)
        self.maximum = maximum

    def result(self) -> Tensor:
        return self.total / self.denominator[..., None]


def attention(
    query: Tensor, new_rows: Tensor, context: AttentionContext, sinks: Tensor, selected: Tensor | None
) -> Tensor:
    result = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    tile = QUERY_TILE if selected is None else _gather_tile(selected.shape[1], query.shape[-1])
    for s, start in enumerate(context.queries.starts):
        first, end = context.queries.offsets[s], context.queries.offsets[s + 1]
        if first == end:
            continue
        window, origin = _window_rows(new_rows, context, s)
        for row in range(first, end, tile):
            stop = min(row + tile, end)
            positions = torch.arange(start + row - first, start + stop - first, device=query.device)
            softmax = _Softmax(query[row:stop], sinks)
            _add_window(softmax, window, origin, positions, context.window)
            if context.entries is not None and selected is not None:
                _add_selected(softmax, context.entries, s, selected[row:stop])
            elif context.entries is not None:
                _add_all(softmax, context.entries, s, (positions + 1) // context.ratio)
            result[row:stop] = softmax.result()
    return result


def _gather_tile(selected: int, width: int) -> int:
    return min(QUERY_TILE, max(1, GATHER_ELEMENTS // (selected * width)))


def _window_rows(new_rows: Tensor, context: AttentionContext, s: int) -> tuple[Tensor, int]:
    """The window rows of a sequence that this step can see, and the position of the first of them."""
    past = context.past
    slots = past.slots[past.offsets[s] : past.offsets[s + 1]]
    new = new_rows[context.keys.offsets[s] : context.keys.offsets[s + 1]]
    return torch.cat([read_rows(past.rows, slots).to(new.dtype), new]), context.keys.starts[s] - len(slots)


def _add_window(softmax: _Softmax, rows: Tensor, origin: int, positions: Tensor, window: int) -> None:
    count = len(positions)
    last = int(positions[0]) + count - 1
    low = max(origin, int(positions[0]) - window + 1)
    keys = torch.arange(low, last + 1, device=rows.device)
    distance = positions[:, None] - keys[None, :]
    softmax.add(rows[low - origin : last + 1 - origin].float(), (distance >= 0) & (distance < window))


def _add_selected(softmax: _Softmax, entries: PagedRows, s: int, selected: Tensor) -> None:
    if entries.offsets[s] == entries.offsets[s + 1]:
        return
    visible = selected >= 0
    # "None" is stood in for by another selected row: an unwritten one may hold anything, NaN too, and a weight of zero
    # would not silence that. Only a query without any entry has no such row.
    stand_in = selected.amax(-1, keepdim=True)
    rows = read_rows(entries.rows, entry_slots(entries, s, torch.where(visible, selected, stand_in).clamp_min(0)))
    if int(stand_in.min()) < 0:
        rows = rows.masked_fill(~visible[..., None], 0.0)
    softmax.add(rows, visible)


def _add_all(softmax: _Softmax, entries: PagedRows, s: int, visible: Tensor) -> None:
    count = int(visible[-1])
    for begin in range(0, count, ENTRY_TILE):
        numbers = torch.arange(begin, min(begin + ENTRY_TILE, count), device=visible.device)
        softmax.add(read_rows(entries.rows, entry_slots(entries, s, numbers)), numbers[None, :] < visible[:, None])
