"""Indexer scores with streaming top-k, plain torch.

Scores exist only for one tile of queries times one tile of keys; between tiles each query keeps its k best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.kernels.arguments import PagedRows, Segments
from thalweg.kernels.reference.paging import entry_slots
from thalweg.kernels.reference.rows import read_rows

KEY_TILE = 2048  # keys scored at once: some MiB of keys, large enough for a good matrix product
SCORE_ELEMENTS = 1 << 22  # queries x heads x keys of one tile: 16 MiB of fp32 scores
_NONE = torch.iinfo(torch.int64).min


Scores = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, weights, key rows -> fp32 [queries, keys]


def index_topk(query: Tensor, weights: Tensor, keys: PagedRows, queries: Segments, ratio: int, k: int) -> Tensor:
    return streaming_topk(_scores, query, weights, keys, queries, ratio, k)


def streaming_topk(
    scores: Scores, query: Tensor, weights: Tensor, keys: PagedRows, queries: Segments, ratio: int, k: int
) -> Tensor:
    """index_topk with a given way to score a tile of queries against a tile of keys."""
    chosen = torch.full((query.shape[0], k), -1, dtype=torch.int64, device=query.device)
    tile = max(1, SCORE_ELEMENTS // (query.shape[1] * KEY_TILE))
    for s, start in enumerate(queries.starts):
        first, end = queries.offsets[s], queries.offsets[s + 1]
        for row in range(first, end, tile):
            stop = min(row + tile, end)
            positions = torch.arange(start + row - first, start + stop - first, device=query.device)
            visible = (positions + 1) // ratio
            count = (start + stop - first) // ratio
            if count == 0:
                continue
            best = _best(scores, query[row:stop], weights[row:stop], keys, s, visible, count, k)
            chosen[row:stop, k - best.shape[1] :] = best
    return chosen


def _best(
    scores: Scores,
    query: Tensor,
    weights: Tensor,
    keys: PagedRows,
    sequence: int,
    visible: Tensor,
    count: int,
    k: int,
) -> Tensor:
    """The k best of `count` entries for a tile of queries: ascending entry numbers, -1 first."""
    device = query.device
    if count <= k:  # everything visible is selected: no need to score
        entries = torch.arange(count, device=device).expand(len(visible), count)
        return torch.where(entries < visible[:, None], entries, -1).sort(-1).values
    running = torch.empty((len(visible), 0), dtype=torch.int64, device=device)
    for begin in range(0, count, KEY_TILE):
        entries = torch.arange(begin, min(begin + KEY_TILE, count), device=device)
        rows = read_rows(keys.rows, entry_slots(keys, sequence, entries))
        ranked = _ranked(scores(query, weights, rows), entries)
        ranked = ranked.masked_fill(entries >= visible[:, None], _NONE)
        running = torch.cat([running, ranked], 1)
        running = running.topk(min(k, running.shape[1]), sorted=False).values
    entries = 0xFFFFFFFF - (running & 0xFFFFFFFF)
    return torch.where(running == _NONE, -1, entries).sort(-1).values


def _scores(query: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """sum_h weights_h * relu(q_h . key), fp32 [queries, keys]."""
    heads = query.float().flatten(0, 1) @ rows.T
    products = torch.relu_(heads).view(query.shape[0], query.shape[1], -1)
    return torch.bmm(weights.float().unsqueeze(1), products).squeeze(1)


def _ranked(scores: Tensor, entries: Tensor) -> Tensor:
    """One int64 per score that orders by score and, among equals, by lowest entry: no ties are left for top-k."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: the two zeros are one score
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - entries)
