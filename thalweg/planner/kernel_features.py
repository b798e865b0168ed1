"""The ideal cost of one V4 attention layer, part by part: what the kernel fits weigh. Seconds on a device's limits.

A *module* is a whole attention layer on one rank: projections, compressor, indexer, selection, attention. Prefill parts
grow with tokens; decode parts with the bytes that one token must read. Heads of attention kernels come in tiles of 64:
fewer heads on a rank cost as much, which is why tensor parallelism does not speed up a long prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thalweg.config.accelerators import Accelerator
from thalweg.config.model import LayerKind, ModelConfig

HEAD_TILE = 64
KV_ROW_BYTES = 584
INDEX_ROW_BYTES = 132
PASS_ENTRIES = 32  # doublings beyond so many entries each cost a decode a pass of splitting and merging
LAUNCH = 1e-5  # seconds: the unit of what does not depend on sizes


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What of a model decides the cost of an attention layer of one kind."""

    kind: LayerKind
    hidden: int
    heads: int
    head_dim: int
    q_rank: int
    o_rank: int
    o_groups: int
    window: int
    ratio: int  # 0 for window layers
    index_heads: int
    index_dim: int
    topk: int

    @classmethod
    def of(cls, config: ModelConfig, kind: LayerKind) -> AttentionShape:
        """The layers of a kind in a model."""
        ratio = {LayerKind.WINDOW: 0, LayerKind.CSA: config.csa_ratio, LayerKind.HCA: config.hca_ratio}[kind]
        return cls(
            kind,
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.q_lora_rank,
            config.o_lora_rank,
            config.o_groups,
            config.window,
            ratio,
            config.index_heads,
            config.index_head_dim,
            config.index_topk,
        )

    @property
    def shared_weights(self) -> float:
        """Elements of the projections that every rank has: query and KV down, compressors, index queries."""
        compressor = 0
        if self.kind is LayerKind.CSA:
            compressor = 4 * self.hidden * (self.head_dim + self.index_dim)
        elif self.kind is LayerKind.HCA:
            compressor = 2 * self.hidden * self.head_dim
        index = self.index_heads * (self.q_rank * self.index_dim + self.hidden) if self.kind is LayerKind.CSA else 0
        return self.hidden * (self.q_rank + self.head_dim) + compressor + index

    def head_weights(self, heads: float) -> float:
        """Elements of the projections of `heads` heads: query up, output in two steps."""
        groups = self.o_groups * heads / self.heads
        return heads * self.head_dim * (self.q_rank + self.o_rank) + groups * self.o_rank * self.hidden


@dataclass(frozen=True, slots=True)
class KernelQuery:
    """One call: `batch` sequences, `new_tokens` each behind `context` tokens, on `heads` heads of a rank.

    For decodes of different lengths `context` is their mean and `longest` the longest. `path` is which way a CSA decode
    selects: 0 there are no more entries than are kept, 1 up to the first switch that the table shows, 2 beyond it.
    """

    batch: float
    new_tokens: float
    context: float
    heads: float
    longest: float = 0.0
    path: int = 0

    @property
    def tokens(self) -> float:
        return self.batch * self.new_tokens

    @property
    def deepest(self) -> float:
        return max(self.context, self.longest)


def tiled(heads: float) -> float:
    """Heads that an attention kernel computes for `heads`."""
    return math.ceil(heads / HEAD_TILE) * HEAD_TILE


def entries(shape: AttentionShape, tokens: float) -> float:
    """Compressed entries of so many tokens."""
    return tokens / shape.ratio if shape.ratio else 0.0


def selected(shape: AttentionShape, tokens: float) -> float:
    """Entries that a query attends to."""
    every = entries(shape, tokens)
    return min(float(shape.topk), every) if shape.kind is LayerKind.CSA else every


def prefill_parts(shape: AttentionShape, query: KernelQuery, device: Accelerator) -> NDArray[np.float64]:
    """Ideal seconds of a prompt chunk: launch, shared projections, head projections, window, entries, index, fresh."""
    tokens, heads = query.tokens, query.heads
    middle = query.context + (query.new_tokens + 1) / 2
    key_flops = 4 * shape.head_dim * tiled(heads) * tokens / device.bf16
    index = tokens * entries(shape, middle) * shape.index_heads * shape.index_dim * 2 / device.fp8
    fresh = tokens * entries(shape, query.new_tokens) / device.fp8 * 2 * shape.index_heads * shape.index_dim
    csa = shape.kind is LayerKind.CSA
    return np.array(
        [
            LAUNCH,
            2 * tokens * shape.shared_weights / device.fp8,
            2 * tokens * shape.head_weights(heads) / device.fp8,
            key_flops * min(shape.window, middle),
            key_flops * selected(shape, middle),
            index if csa else 0.0,
            fresh if csa and query.context == 0 else 0.0,
            4 * tokens * heads * shape.head_dim / device.bandwidth,
        ]
    )


def decode_parts(shape: AttentionShape, query: KernelQuery, device: Accelerator) -> NDArray[np.float64]:
    """Ideal seconds of a decode: launch, batched launch, shared and head weights, arithmetic, attended rows, longest
    rows, all rows, heads of tokens, passes over the longest, and what the path of selection adds."""
    batch, tokens, heads = query.batch, query.tokens, query.heads
    every, longest = entries(shape, query.context), entries(shape, query.deepest)
    csa = shape.kind is LayerKind.CSA
    row = INDEX_ROW_BYTES if csa else KV_ROW_BYTES
    return np.array(
        [
            LAUNCH,
            LAUNCH if batch > 1 else 0.0,
            shape.shared_weights / device.bandwidth,
            shape.head_weights(heads) / device.bandwidth,
            2 * tokens * (shape.shared_weights + shape.head_weights(heads)) / device.fp8,
            tokens * (selected(shape, query.context) + shape.window) * KV_ROW_BYTES / device.bandwidth,
            0.0 if csa else longest * row / device.bandwidth,  # index keys are read by all multiprocessors
            batch * every * row / device.bandwidth,
            4 * tokens * heads * shape.head_dim / device.bandwidth,
            LAUNCH * math.log2(1 + longest / PASS_ENTRIES),
            LAUNCH if csa and query.path == 1 else 0.0,
            LAUNCH * tokens if csa and query.path == 1 else 0.0,
            LAUNCH if csa and query.path > 1 else 0.0,
        ]
    )


def index_parts(shape: AttentionShape, query: KernelQuery, device: Accelerator) -> NDArray[np.float64]:
    """Ideal seconds of the indexer's logits alone, or of the selection alone: launch, passes, arithmetic, scores, keys,
    a fresh prompt's scores, results, and the longest row of scores."""
    middle = query.context + (query.new_tokens + 1) / 2
    scored = query.tokens * entries(shape, middle)
    deepest = entries(shape, query.context + query.new_tokens)
    return np.array(
        [
            LAUNCH,
            LAUNCH * math.log2(1 + deepest / shape.topk),
            scored * shape.index_heads * shape.index_dim * 2 / device.fp8,
            scored * 4 / device.bandwidth,
            query.batch * deepest * INDEX_ROW_BYTES / device.bandwidth,
            query.tokens * entries(shape, query.new_tokens) * 4 / device.bandwidth,
            query.tokens * shape.topk * 4 / device.bandwidth,
            deepest * INDEX_ROW_BYTES / device.bandwidth,
        ]
    )
