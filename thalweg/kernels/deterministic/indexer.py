"""Indexer scores from products of fixed shape; the choice among them is the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import PagedRows, Segments
from thalweg.kernels.deterministic.linear import product
from thalweg.kernels.deterministic.sums import folded
from thalweg.kernels.reference.indexer import streaming_topk

SCORE_TILE = 512  # keys of one product; a short history pays for all of them


def index_topk(query: Tensor, weights: Tensor, keys: PagedRows, queries: Segments, ratio: int, k: int) -> Tensor:
    return streaming_topk(_scores, query, weights, keys, queries, ratio, k)


def _scores(query: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """sum_h weights_h * relu(q_h . key), fp32 [queries, keys]. The first row is always a multiple of SCORE_TILE."""
    heads, weights = query.float(), weights.float().unsqueeze(-1)
    parts = []
    for begin in range(0, len(rows), SCORE_TILE):
        tile = rows[begin : begin + SCORE_TILE]
        keys = rows.new_zeros((SCORE_TILE, rows.shape[1]))
        keys[: len(tile)] = tile
        products = product(heads, keys)[..., : len(tile)]
        parts.append(folded(torch.relu(products) * weights))
    return torch.cat(parts, 1)
