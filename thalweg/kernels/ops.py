"""The operations of a V4 forward pass, as typed signatures. A backend offers functions of these shapes.

T tokens in a flat ragged batch, Q of them with queries, D hidden, N residual streams, H heads of d elements (the last r
rotated), E compressed entries, k selected entries, m tokens per entry.
All ops but store_rows, insert_entries, rotate and rotate_to are pure: they return new tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thalweg.kernels.arguments import (
    AttentionContext,
    EntryTarget,
    Ints,
    Matrix,
    PagedRows,
    Segments,
    StoredRows,
    Weight,
    Windows,
)


class Pack(Protocol):
    """A weight [N, K] or [G, N, K] in the form in which this backend multiplies by it. Once, when a model is loaded.

    A quantised one is widened, exactly, by a backend that does not multiply by it as it is.
    """

    def __call__(self, weight: Matrix) -> Weight: ...


class Linear(Protocol):
    """x [..., K] times weight [N, K], transposed: [..., N] in the dtype of x."""

    def __call__(self, x: Tensor, weight: Weight) -> Tensor: ...


class GroupedLinear(Protocol):
    """Each group with its own weight: x [T, G, K], weight [G, N, K] -> [T, G, N]."""

    def __call__(self, x: Tensor, weight: Weight) -> Tensor: ...


class RmsNorm(Protocol):
    """w * x / sqrt(mean(x^2) + eps) over the last axis, in fp32, cast back once; no weight: 1."""

    def __call__(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...


class Rotate(Protocol):
    """Rotate interleaved pairs of the last r channels of x [T, ..., d] by cos, sin fp32 [T, r/2] (model-spec 3.4).

    In place: the other channels, most of a row, are neither read nor written. Returns x.
    """

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


class NormRotate(Protocol):
    """RmsNorm, then Rotate, of x [T, ..., d] as a new tensor: the queries of all heads, or a KV row."""

    def __call__(self, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor: ...


class RotateTo(Protocol):
    """Rotate x fp32 [T, ..., d], then cast to `dtype`: what attention gives, turned back for the output projection.
    x is given up."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor: ...


class MixIn(Protocol):
    """mHC before a sublayer: streams [T, N, D] -> (input [T, D], post fp32 [T, N], comb fp32 [T, N, N]).

    fn [(2+N)N, N*D], base [(2+N)N], scale [3], all fp32; comb is made doubly stochastic by `iterations` Sinkhorn
    rounds that begin with a softmax and end on columns (model-spec 3.2).
    """

    def __call__(
        self, streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class MixOut(Protocol):
    """mHC after a sublayer: post_k * y + sum_j comb[j, k] * streams_j, fp32, cast to the streams' dtype."""

    def __call__(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor: ...


class MixHead(Protocol):
    """mHC before the head: streams [T, N, D] -> [T, D]; fn [N, N*D], base [N], scale [1] (model-spec 3.9)."""

    def __call__(
        self, streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float
    ) -> Tensor: ...


class Compress(Protocol):
    """Gated pooling (model-spec 3.5): rows [R, 2*dim] fp32 are value then gate; own [E, m] picks each entry's tokens.

    With `previous` (rows [S, 2*dim] and [E, m], -1: none) the window before joins the same softmax. fp32 [E, dim].
    """

    def __call__(
        self, rows: Tensor, own: Tensor, previous_rows: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor: ...


class InsertEntries(Protocol):
    """New entries, from tokens to cache rows: Compress, cast to the dtype of `weight` [dim], RmsNorm, Rotate by
    cos, sin fp32 [E, r/2], the target's rounding, StoreRows."""

    def __call__(
        self, windows: Windows, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, target: EntryTarget
    ) -> None: ...


class IndexTopk(Protocol):
    """The k best visible entries of each query by sum_h weights_h * relu(q_h . key): int64 [Q, k], ascending, -1 first.

    query [Q, heads, n], weights fp32 [Q, heads] (scales included), one key per `ratio` tokens; the query at position t
    sees entries below (t+1)//ratio. Equal scores: the lowest entry wins. Nothing of size Q x context is ever stored.
    """

    def __call__(
        self, query: Tensor, weights: Tensor, keys: PagedRows, queries: Segments, ratio: int, k: int
    ) -> Tensor: ...


class Attention(Protocol):
    """softmax over window, compressed entries and sink; key = value (model-spec 3.3, 3.6). Scale d^-0.5.

    query [Q, H, d]; new_rows [T, d] are the window rows of this step's tokens; sinks fp32 [H]; `selected` int64 [Q, k]
    restricts the entries (-1: none), without it all visible ones take part. Returns fp32 [Q, H, d].
    """

    def __call__(
        self, query: Tensor, new_rows: Tensor, context: AttentionContext, sinks: Tensor, selected: Tensor | None
    ) -> Tensor: ...


class Route(Protocol):
    """Scores sqrt(softplus(logits)) [T, experts] -> (expert ids int64 [T, k], weights fp32 [T, k]) (model-spec 3.8).

    `chosen` [T, k] fixes the experts (hash routing); else the k best of score + bias, lowest id first among equals.
    """

    def __call__(
        self, logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
    ) -> tuple[Tensor, Tensor]: ...


class SwiGlu(Protocol):
    """silu(min(gate, limit)) * clamp(up, +-limit), fp32 (model-spec 3.8)."""

    def __call__(self, gate: Tensor, up: Tensor, limit: float) -> Tensor: ...


class Experts(Protocol):
    """Sum over each token's experts of down(weight * silu(min(gate, limit)) * clamp(up, +-limit)), fp32 [T, D].

    x [T, D], ids and weights [T, k], gate_up [experts, 2*inter, D] (gate rows first), down [experts, D, inter].
    """

    def __call__(
        self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weight, down: Weight, limit: float
    ) -> Tensor: ...


class RoundKv(Protocol):
    """FP8 storage rounding of KV rows [..., d]: all but the last r channels to e4m3 in blocks of 64, the
    rotated ones to bf16 (model-spec 5)."""

    def __call__(self, rows: Tensor, rope_dim: int) -> Tensor: ...


class RoundIndex(Protocol):
    """Hadamard rotation and FP4 rounding of index queries or keys [..., n], blocks of 32 (model-spec 3.7, 5)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class RoundIndexFp8(Protocol):
    """FP8 storage rounding of index keys [..., n]: e4m3 under one scale per key, largest magnitude / 448. fp32."""

    def __call__(self, keys: Tensor) -> Tensor: ...


class StoreRows(Protocol):
    """Write rows [R, width] of any float dtype to `slots` int64 [R] of a cache stream, in its byte format; nothing for
    a slot of -1.

    Packing rounds as round_kv, round_index_fp8 or (keys being rotated already) round_index do, and holds rows that were
    rounded by round_kv or round_index exactly.
    """

    def __call__(self, stored: StoredRows, slots: Tensor, rows: Tensor) -> None: ...


class ReadRows(Protocol):
    """Gather rows of a cache stream: fp32 [..., width] for slots int64 [...]. Only what is gathered is unpacked."""

    def __call__(self, stored: StoredRows, slots: Tensor) -> Tensor: ...


class Sample(Protocol):
    """One token for each row of logits [O, vocab], int64 [O]; a row's token depends on that row alone.

    controls float64 [O, 5] are temperature, top_k (0: off), top_p (1: off), min_p (0: off) and a uniform number in
    [0, 1) for each. At temperature 0 the largest logit, lowest id first among equals. Else the token at that share of
    the kept probabilities, the most likely first, lowest id first among equals: kept are the top_k first, those before
    which less than top_p of the whole lies, those of min_p of the largest or more, and always the first.
    """

    def __call__(self, logits: Tensor, controls: Tensor) -> Tensor: ...


@runtime_checkable
class Repeat(Protocol):
    """Computes steps again and again; a backend may note what the first of a shape asked of its kernels.

    run(shape, tensors, ints, compute) is compute(), bit for bit. `shape` has all sizes that `compute` can see, and
    which tensors are empty; `tensors` and `ints` are all that it reads of this step, always in the same order.
    """

    def run(
        self, shape: Hashable, tensors: Sequence[Tensor], ints: Sequence[Ints], compute: Callable[[], Tensor]
    ) -> Tensor: ...

    def kernel_under_way(self) -> str | None:
        """The kernel that a repeated step is in, as another thread sees it."""
        ...


class Capture(Protocol):
    """Notes what a computation asks of a device, so that it can be done again in one call.

    record(compute) gives a function that does the work of compute() again: the same kernels on the same memory. Whether
    `compute` itself has been carried out is left open. The result is overwritten by the next call of any such function.
    """

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


MakeRepeat = Callable[[Iterable[Tensor]], Repeat]  # over the weights and pools that steps read and write


@dataclass(frozen=True, slots=True)
class Kernels:
    """One function per op, as chosen at start-up by registry.select_kernels."""

    pack: Pack
    linear: Linear
    grouped_linear: GroupedLinear
    rms_norm: RmsNorm
    rotate: Rotate
    norm_rotate: NormRotate
    rotate_to: RotateTo
    mix_in: MixIn
    mix_out: MixOut
    mix_head: MixHead
    compress: Compress
    insert_entries: InsertEntries
    index_topk: IndexTopk
    attention: Attention
    route: Route
    swiglu: SwiGlu
    experts: Experts
    round_kv: RoundKv
    round_index: RoundIndex
    round_index_fp8: RoundIndexFp8
    store_rows: StoreRows
    read_rows: ReadRows
    sample: Sample
