"""Gated pooling of tokens into compressed entries, plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(rows: Tensor, own: Tensor, previous_rows: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
    value, gate = windows(rows, own, previous_rows, previous)
    return (torch.softmax(gate, 1) * value).sum(1)


def windows(rows: Tensor, own: Tensor, previous_rows: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and gates [E, tokens, dim] of the tokens that each entry pools; absent ones have gate -inf."""
    value, gate = rows[own].chunk(2, -1)
    if previous_rows is not None and previous is not None:
        old_value, old_gate = previous_rows[previous.clamp_min(0)].chunk(2, -1)
        absent = (previous < 0).unsqueeze(-1)
        value = torch.cat([old_value.masked_fill(absent, 0.0), value], 1)
        gate = torch.cat([old_gate.masked_fill(absent, float("-inf")), gate], 1)
    return value, gate
