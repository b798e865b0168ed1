"""Attention over window, compressed entries and sink."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import AttentionContext, Packing, StoredRows
from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.deterministic import attention as deterministic

# RowFormat in native/rows.h.
_FLOAT, _BFLOAT16, _FP8_KV = range(3)
_NO_ROWS = (0, _FLOAT, 0, 0)


def attention(
    library: Library,
    query: Tensor,
    new_rows: Tensor,
    context: AttentionContext,
    sinks: Tensor,
    selected: Tensor | None,
) -> Tensor:
    """query [Q, H, d], new_rows [T, d], sinks [H], selected int64 [Q, k] or None -> fp32 [Q, H, d]."""
    past, entries = context.past, context.entries
    past_form = _form(past.rows)
    entry_form = _NO_ROWS if entries is None else _form(entries.rows)
    if past_form is None or entry_form is None:
        return deterministic.attention(query, new_rows, context, sinks, selected)
    query, new_rows, sinks = wide(query), wide(new_rows), wide(sinks)
    if selected is not None:
        selected = selected.contiguous()
    out = torch.empty(query.shape)
    _, heads, width = query.shape
    queries, keys = context.queries, context.keys
    library.attention(
        address(query), address(new_rows), address(sinks), address(out), address(selected),
        0 if selected is None else selected.shape[1], heads, width, context.window, context.ratio,
        *past_form, address(past.slots), *entry_form,
        0 if entries is None else address(entries.blocks), 0 if entries is None else entries.rows_per_block,
        len(queries), queries.offsets.address, queries.starts.address, keys.offsets.address, keys.starts.address,
        past.offsets.address, 0 if entries is None else entries.offsets.address, library.threads,
    )  # fmt: skip
    return out


def _form(rows: StoredRows) -> tuple[int, int, int, int] | None:
    """Address, format, bytes from row to row, rotated channels; None: a form that no kernel reads."""
    data, rope = rows.data, rows.rope_dim
    if data.stride(1) != 1:
        return None
    if rows.packing is Packing.FP8_KV:
        return data.data_ptr(), _FP8_KV, data.stride(0), rope
    if rows.packing is not Packing.PLAIN:
        return None
    if data.dtype is torch.float32:
        return data.data_ptr(), _FLOAT, 4 * data.stride(0), 0
    if data.dtype is torch.bfloat16:
        return data.data_ptr(), _BFLOAT16, 2 * data.stride(0), 0
    return None
