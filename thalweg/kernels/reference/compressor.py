"""Gated pooling of tokens into compressed entries, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import EntryTarget, RowRounding, Windows
from thalweg.kernels.ops import RoundIndex, RoundIndexFp8, RoundKv
from thalweg.kernels.reference.quantize import round_index, round_index_fp8, round_kv
from thalweg.kernels.reference.rotary import norm_rotate
from thalweg.kernels.reference.rows import store_rows


def compress(rows: Tensor, own: Tensor, previous_rows: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
    value, gate = values_and_gates(rows, own, previous_rows, previous)
    return (torch.softmax(gate, 1) * value).sum(1)


def insert_entries(windows: Windows, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, target: EntryTarget) -> None:
    insert_pooled(compress(*tokens(windows)), weight, eps, cos, sin, target)


def insert_pooled(pooled: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, target: EntryTarget) -> None:
    """What follows pooling."""
    entries = norm_rotate(pooled.to(weight.dtype), weight, eps, cos, sin)
    store_rows(target.stored, target.slots, rounded(entries, target, round_kv, round_index, round_index_fp8))


def rounded(entries: Tensor, target: EntryTarget, kv: RoundKv, index: RoundIndex, index_fp8: RoundIndexFp8) -> Tensor:
    """Entries on their way to a target, by a backend's own roundings."""
    match target.rounding:
        case RowRounding.KV:
            return kv(entries, target.stored.rope_dim)
        case RowRounding.INDEX:
            return index(entries)
        case RowRounding.INDEX_FP8:
            return index_fp8(entries)
        case RowRounding.NONE:
            return entries


def tokens(windows: Windows) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of `compress`."""
    before = None if windows.rows_before is None else windows.rows_before.joined()
    return windows.rows.joined(), windows.own, before, windows.previous


def values_and_gates(
    rows: Tensor, own: Tensor, previous_rows: Tensor | None, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values and gates [E, tokens, dim] of the tokens that each entry pools; absent ones have gate -inf."""
    value, gate = rows[own].chunk(2, -1)
    if previous_rows is not None and previous is not None:
        old_value, old_gate = previous_rows[previous.clamp_min(0)].chunk(2, -1)
        absent = (previous < 0).unsqueeze(-1)
        value = torch.cat([old_value.masked_fill(absent, 0.0), value], 1)
        gate = torch.cat([old_gate.masked_fill(absent, float("-inf")), gate], 1)
    return value, gate
