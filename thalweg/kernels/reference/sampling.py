"""From logits to a token by one uniform number, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, controls: Tensor) -> Tensor:
    rows = zip(logits, controls.tolist(), strict=True)
    tokens = [row.argmax() if own[0] == 0 else _drawn(row, *own) for row, own in rows]
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64, device=logits.device)


def _drawn(logits: Tensor, temperature: float, top_k: float, top_p: float, min_p: float, uniform: float) -> Tensor:
    """Inverse-CDF draw from the truncated distribution, most likely tokens first (ties: lowest id first)."""
    scaled = logits.double() / temperature
    probabilities, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if top_k > 0:
        keep[int(top_k) :] = False
    if top_p < 1.0:
        keep &= probabilities.cumsum(-1) - probabilities < top_p
    if min_p > 0.0:
        keep &= probabilities >= min_p * probabilities[0]
    keep[0] = True
    weights = torch.where(keep, probabilities, torch.zeros_like(probabilities)).cumsum(-1)
    place = torch.searchsorted(weights, uniform * weights[-1], right=True)
    return order[torch.minimum(place, keep.nonzero()[-1, 0])]
