"""Matrix products of fixed shape: whatever the batch is, the library sees the same kernel and the same order of sums.

A library chooses its kernel by the shapes and by how addresses are aligned. So every product here takes TILE rows, in
memory of their own, and the summed axis is padded to whole vectors. That a row's result does not depend on its place
in such a tile is no promise of the library: tests hold it to that, and start-up tries the shapes of the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from thalweg.kernels.arguments import Weight

TILE = 32  # rows of one product: one decoding request pays for all of them, a prompt for a call per tile
VECTOR = 16  # fp32 elements of the widest vector: an unaligned rest changed the order of sums from row to row


def padded(x: Tensor) -> Tensor:
    """The last axis filled with zeros to whole vectors."""
    rest = -x.shape[-1] % VECTOR
    return F.pad(x, (0, rest)) if rest else x


def linear(x: Tensor, weight: Weight) -> Tensor:
    return product(x, weight.data)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]."""
    rows, weight = x.flatten(0, -2), padded(weight)
    whole = -(-len(rows) // TILE) * TILE
    tiles = rows.new_zeros((whole, weight.shape[1]))
    tiles[: len(rows), : rows.shape[1]] = rows
    result = rows.new_empty((whole, len(weight)))
    across = weight.T
    for row in range(0, whole, TILE):
        torch.mm(tiles[row : row + TILE], across, out=result[row : row + TILE])
    return result[: len(rows)].unflatten(0, x.shape[:-1])


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    return torch.stack([product(x[:, group], part) for group, part in enumerate(weight.data)], 1)


def each_product(left: Tensor, right: Tensor) -> Tensor:
    """left [B, M, K] with right [B, K, N], one after another: M, K and N must not depend on the batch."""
    result = left.new_empty((len(left), left.shape[1], right.shape[2]))
    for a, b, out in zip(left, right, result, strict=True):
        torch.mm(a, b, out=out)
    return result


def varying_shapes(weights: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of weights for which, on this machine, a row's result does depend on its place in the tile: none, if all
    is well. Weights with more than two axes stand for many of the last two."""
    shapes = {(w.shape[-2:], w.dtype): w.flatten(0, -3)[0] if w.dim() > 2 else w for w in weights if w.dim() > 1}
    return [tuple(w.shape) for w in shapes.values() if w.is_floating_point() and _varies(w)]


def _varies(weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((TILE, weight.shape[1]), generator=generator).to(weight.dtype)
    whole = product(rows, weight)
    turned, alone = product(rows.flip(0), weight).flip(0), product(rows[TILE // 2 : TILE // 2 + 1], weight)
    return not (torch.equal(turned, whole) and torch.equal(alone[0], whole[TILE // 2]))
