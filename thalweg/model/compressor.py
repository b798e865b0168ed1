"""Compressors: m tokens become one entry (model-spec section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.kernels.ops import Kernels
from thalweg.model.inputs import CacheRows, CompressorInputs, RowWrites
from thalweg.model.rotary import Angles
from thalweg.model.weights import Weights


@dataclass(frozen=True, slots=True)
class CompressorStreams:
    """Cache streams of one compressor; `tail` is None where windows do not overlap."""

    pending: str
    tail: str | None


def write_rows(cache_rows: Tensor, writes: RowWrites, rows: Tensor) -> None:
    """Scatter new rows into a cache stream."""
    cache_rows.index_copy_(0, writes.slots, rows[writes.source].to(cache_rows.dtype))


class Compressor:
    """One compressor of one layer. Values and gates are fp32; ape is added when a token arrives.

    With overlap the projections give two halves: the first serves the next entry, the second the token's own.
    """

    def __init__(
        self, weights: Weights, layer: int, streams: CompressorStreams, norm_eps: float, kernels: Kernels
    ) -> None:
        self._wkv, self._wgate = weights.matrix("wkv.weight"), weights.matrix("wgate.weight")
        self._ape, self._norm = weights["ape"], weights["norm.weight"]
        self._layer = layer
        self._streams = streams
        self._eps = norm_eps
        self._kernels = kernels

    def entries(self, x: Tensor, phase: Tensor, step: CompressorInputs, angles: Angles, cache: CacheRows) -> Tensor:
        """Entries [E, dim], normed and rotated, that the T new tokens x [T, D] complete; keeps the state of the rest.

        phase [T] is each token's position mod m; `angles` are those of the entries' first tokens.
        """
        wide = x.float()
        value = self._kernels.linear(wide, self._wkv)
        gate = self._kernels.linear(wide, self._wgate) + self._ape[phase]
        tail = self._streams.tail
        if tail is None:
            own = torch.cat([value, gate], -1)
            rows = self._with_cached(self._streams.pending, step.pending_slots, own, cache)
            pooled = self._kernels.compress(rows, step.own)
        else:
            next_value, own_value = value.chunk(2, -1)
            next_gate, own_gate = gate.chunk(2, -1)
            own, following = torch.cat([own_value, own_gate], -1), torch.cat([next_value, next_gate], -1)
            assert step.tail_slots is not None and step.previous is not None and step.tail_writes is not None
            pooled = self._kernels.compress(
                self._with_cached(self._streams.pending, step.pending_slots, own, cache),
                step.own,
                self._with_cached(tail, step.tail_slots, following, cache),
                step.previous,
            )
            write_rows(cache.rows(tail, self._layer), step.tail_writes, following)
        write_rows(cache.rows(self._streams.pending, self._layer), step.pending_writes, own)
        normed = self._kernels.rms_norm(pooled.to(x.dtype), self._norm, self._eps)
        return self._kernels.rotate(normed, angles.cos, angles.sin)

    def _with_cached(self, stream: str, slots: Tensor, new: Tensor, cache: CacheRows) -> Tensor:
        return torch.cat([cache.rows(stream, self._layer)[slots], new])
