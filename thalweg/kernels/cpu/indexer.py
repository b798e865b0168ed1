"""Indexer scores with streaming top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import Packing, PagedRows, Segments, StoredRows
from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.deterministic import indexer as deterministic

_FORMATS = {Packing.FP8_INDEX: 2, Packing.FP4_INDEX: 3}  # the rest as in native/index_rows.h
_PLAIN = {torch.float32: 0, torch.bfloat16: 1}


def index_topk(
    library: Library, query: Tensor, weights: Tensor, keys: PagedRows, queries: Segments, ratio: int, k: int
) -> Tensor:
    """query [Q, heads, n], weights [Q, heads] -> int64 [Q, k]."""
    rows = keys.rows
    form = _format(rows)
    if form is None:
        return deterministic.index_topk(query, weights, keys, queries, ratio, k)
    query, weights = wide(query), wide(weights)
    out = torch.empty((query.shape[0], k), dtype=torch.int64)
    library.index_topk(
        address(query), address(weights), query.shape[1], query.shape[2], rows.data.data_ptr(),
        rows.data.stride(0) * rows.data.element_size(), form, address(keys.blocks), keys.rows_per_block,
        queries.offsets.address, queries.starts.address, keys.offsets.address, len(queries), ratio, k, address(out),
        library.threads,
    )  # fmt: skip
    return out


def _format(rows: StoredRows) -> int | None:
    """The format's number in native/index_rows.h; None for one that it does not read."""
    if rows.data.stride(1) != 1:
        return None
    return _PLAIN.get(rows.data.dtype) if rows.packing is Packing.PLAIN else _FORMATS.get(rows.packing)
