"""Gated pooling of tokens into compressed entries."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.cpu.library import Library, address, wide


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
