"""Gated pooling of tokens into compressed entries, with additions in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.kernels.arguments import EntryTarget, Windows
from thalweg.kernels.deterministic.sums import folded
from thalweg.kernels.reference.compressor import insert_pooled, tokens, values_and_gates


def compress(rows: Tensor, own: Tensor, previous_rows: Tensor | None = None, previous: Tensor | None = None) -> Tensor:
    value, gate = values_and_gates(rows, own, previous_rows, previous)
    weights = torch.exp(gate - gate.amax(1, keepdim=True))
    return folded(weights * value) / folded(weights)


def insert_entries(windows: Windows, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, target: EntryTarget) -> None:
    insert_pooled(compress(*tokens(windows)), weight, eps, cos, sin, target)
