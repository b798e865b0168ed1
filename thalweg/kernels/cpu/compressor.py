"""Gated pooling of tokens into compressed entries."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from thalweg.kernels.arguments import EntryTarget, Windows
from thalweg.kernels.cpu.library import Library, address, wide
from thalweg.kernels.cpu.quantize import round_index, round_index_fp8, round_kv
from thalweg.kernels.cpu.rotary import norm_rotate
from thalweg.kernels.cpu.rows import store_rows
from thalweg.kernels.reference.compressor import rounded, tokens


def compress(
    library: Library, rows: Tensor, own: Tensor, previous_rows: Tensor | None = None, previous: Tensor | None = None
) -> Tensor:
    """Rows that `previous` leaves out by -1 are never read."""
    entries, tokens = own.shape
    out = torch.empty((entries, rows.shape[1] // 2))
    if not entries:  # most steps of a few tokens complete none
        return out
    rows, own = wide(rows), own.contiguous()
    before = 0
    if previous_rows is not None and previous is not None:
        previous_rows, previous, before = wide(previous_rows), previous.contiguous(), previous.shape[1]
    library.compress(
        address(rows), address(own), entries, tokens, out.shape[1], address(previous_rows), address(previous), before,
        address(out), library.threads,
    )  # fmt: skip
    return out


def insert_entries(
    library: Library,
    windows: Windows,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    target: EntryTarget,
) -> None:
    pooled = compress(library, *tokens(windows)).to(weight.dtype)
    entries = norm_rotate(library, pooled, weight, eps, cos, sin)
    roundings = (partial(round_, library) for round_ in (round_kv, round_index, round_index_fp8))
    store_rows(library, target.stored, target.slots, rounded(entries, target, *roundings))
