"""Compressors: m tokens become one entry (model-spec section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.kernels.arguments import EntryTarget, TokenRows, Windows, plain_rows
from thalweg.kernels.ops import Kernels
from thalweg.model.inputs import CacheRows, CompressorInputs, RowWrites
from thalweg.model.rotary import Angles
from thalweg.model.weights import Weights


@dataclass(frozen=True, slots=True)
class CompressorStreams:
    """Cache streams of one compressor; `tail` is None where windows do not overlap."""

    pending: str
    tail: str | None


class Compressor:
    """One compressor of one layer. Values and gates are fp32; ape is added when a token arrives.

    With overlap the projections give two halves: the first serves the next entry, the second the token's own.
    """

    def __init__(
        self, weights: Weights, layer: int, streams: CompressorStreams, norm_eps: float, kernels: Kernels
    ) -> None:
        halves = 1 if streams.tail is None else 2
        value, gate = weights.take("wkv.weight").chunk(halves), weights.take("wgate.weight").chunk(halves)
        # One product gives the rows of the cache as they are kept: value and gate for the next entry, then for the own.
        self._projection = weights.packed(torch.cat([part for half in zip(value, gate, strict=True) for part in half]))
        ape = weights.take("ape").chunk(halves, 1)
        self._ape = weights.kept(torch.cat([part for half in ape for part in (torch.zeros_like(half), half)], 1))
        self._norm = weights["norm.weight"]
        self._layer = layer
        self._streams = streams
        self._eps = norm_eps
        self._kernels = kernels

    def insert(
        self, x: Tensor, phase: Tensor, step: CompressorInputs, angles: Angles, cache: CacheRows, target: EntryTarget
    ) -> None:
        """Write the entries that the T new tokens x [T, D] complete, in most decode steps none; keep the state of the
        rest.

        phase [T] is each token's position mod m; `angles` are those of the entries' first tokens.
        """
        tail = self._streams.tail
        rows = self._kernels.linear(x.float(), self._projection) + self._ape[phase]
        following, own = rows.chunk(2, -1) if tail is not None else (rows, rows)
        if len(step.own):
            windows = self._windows(own, following, step, cache)
            self._kernels.insert_entries(windows, self._norm, self._eps, angles.cos, angles.sin, target)
        if tail is not None and step.tail_writes is not None:
            self._write(tail, step.tail_writes, following, cache)
        self._write(self._streams.pending, step.pending_writes, own, cache)

    def _windows(self, own: Tensor, following: Tensor, step: CompressorInputs, cache: CacheRows) -> Windows:
        rows = TokenRows(cache.rows(self._streams.pending, self._layer), step.pending_slots, own)
        if self._streams.tail is None:
            return Windows(rows, step.own)
        assert step.tail_slots is not None, "windows overlap, and nothing says with what"
        before = TokenRows(cache.rows(self._streams.tail, self._layer), step.tail_slots, following)
        return Windows(rows, step.own, before, step.previous)

    def _write(self, stream: str, writes: RowWrites, rows: Tensor, cache: CacheRows) -> None:
        self._kernels.store_rows(plain_rows(cache.rows(stream, self._layer)), writes.slots, writes.of(rows))
