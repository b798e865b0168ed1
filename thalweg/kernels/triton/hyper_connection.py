"""Manifold-constrained hyper-connections (mHC): a product that reads streams and fn once, then what follows from it.

The product has up to 28,672 columns and a single row in decode, so its columns are dealt to programs in chunks of fixed
size; the next kernel adds their sums in the order of the chunks. fp32 operands are cut into three bfloat16 parts, whose
products tensor cores add up in fp32; bfloat16 streams are their own first part, and the other two, zero, are left out.

Neither tiles nor chunks depend on how many rows there are, and each row of a product is a sum of its own: company does
not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Weight
from thalweg.kernels.triton.launch import Launch

CHUNK = (
    512  # columns of a partial sum: 32 programs for one row of Flash, 56 of Pro; partials are 6% of the streams' bytes
)
STEP = 64  # columns of one product: 64 x 64 of streams and 32 x 64 of fn leave room for three stages
ROWS = 64  # the least rows of a warp group's product: those that are not there cost a decode step nothing
OUTPUTS = 32  # outputs of a product: (2 + N) N is 24 for four streams
CHANNELS = 1024  # of one program of what follows: 8 for each thread, 16 bytes of bfloat16
TAKEN = 32  # partial sums read at once: those of Flash in one go, those of Pro in two
PRODUCT_OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def mix_in(
    streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, hidden = streams.shape
    x = torch.empty((tokens, hidden), dtype=streams.dtype, device=streams.device)
    post = torch.empty((tokens, n), dtype=torch.float32, device=streams.device)
    comb = torch.empty((tokens, n, n), dtype=torch.float32, device=streams.device)
    if tokens:
        streams = streams.contiguous()
        parts = _projected(streams, fn.data)
        _mix_in[(tokens, 1 + triton.cdiv(hidden, CHANNELS))](
            streams, parts, base, scale, x, post, comb, tokens, hidden, norm_eps, eps, iterations,
            **_mix_tile(n, hidden), **OPTIONS,
        )  # fmt: skip
    return x, post, comb


def mix_out(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    tokens, n, hidden = streams.shape
    if tokens:
        _mix_out[(tokens, triton.cdiv(hidden, CHANNELS))](
            y.contiguous(), streams.contiguous(), post.contiguous(), comb.contiguous(), out, hidden,
            **_out_tile(n), **OPTIONS,
        )  # fmt: skip
    return out


def mix_head(streams: Tensor, fn: Weight, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
    tokens, n, hidden = streams.shape
    x = torch.empty((tokens, hidden), dtype=streams.dtype, device=streams.device)
    if tokens:
        streams = streams.contiguous()
        parts = _projected(streams, fn.data)
        _mix_head[(tokens, triton.cdiv(hidden, CHANNELS))](
            streams, parts, base, scale, x, tokens, hidden, norm_eps, eps, **_mix_tile(n, hidden), **OPTIONS
        )
    return x


def _projected(streams: Tensor, fn: Tensor) -> Tensor:
    """Partial sums fp32 [chunks, T, outputs + 1] with v the flattened streams: fn . v, and last the squares of v."""
    tokens, width = streams.shape[0], fn.shape[1]
    chunks, outputs = triton.cdiv(width, CHUNK), fn.shape[0]
    parts = torch.empty((chunks, tokens, outputs + 1), dtype=torch.float32, device=streams.device)
    # Chunks vary fastest: programs that run together read all of fn and the rows of few tiles.
    grid = (chunks, triton.cdiv(tokens, ROWS), triton.cdiv(outputs, OUTPUTS))
    _project[grid](streams, fn, parts, tokens, width, outputs, **_PRODUCT, **PRODUCT_OPTIONS)
    return parts


_PRODUCT = {"ROWS": ROWS, "OUTPUTS": OUTPUTS, "CHUNK": CHUNK, "STEP": STEP}


def _mix_tile(n: int, hidden: int) -> dict[str, int]:
    chunks, padded = triton.cdiv(n * hidden, CHUNK), triton.next_power_of_2(n)
    return {"N": n, "NP": padded, "CHUNKS": chunks, "TAKEN": TAKEN, "CHANNELS": CHANNELS}


def _out_tile(n: int) -> dict[str, int]:
    return {"N": n, "NP": triton.next_power_of_2(n), "CHANNELS": CHANNELS}


@triton.jit
def _project(
    streams,
    fn,
    parts,
    tokens,
    width,
    outputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Partial sums of one chunk of columns: ROWS tokens times OUTPUTS rows of fn."""
    chunk = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    squares = tl.zeros([ROWS, STEP], tl.float32)
    for begin in range(0, CHUNK, STEP):
        column = chunk * CHUNK + begin + tl.arange(0, STEP)
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        v = tl.load(streams + token[:, None] * width + column[None, :], mask=inside, other=0.0)
        held = (output < outputs)[:, None] & (column < width)[None, :]
        f = tl.load(fn + output[:, None].to(tl.int64) * width + column[None, :], mask=held, other=0.0)
        f = tl.trans(f.to(tl.float32))
        f1 = f.to(tl.bfloat16)
        rest = f - f1.to(tl.float32)
        f2 = rest.to(tl.bfloat16)
        f3 = (rest - f2.to(tl.float32)).to(tl.bfloat16)
        wide = v.to(tl.float32)
        squares += wide * wide
        if v.dtype == tl.bfloat16:
            v1 = v
            sums = tl.dot(v1, f3, sums)
        else:
            v1 = wide.to(tl.bfloat16)
            left = wide - v1.to(tl.float32)
            v2 = left.to(tl.bfloat16)
            v3 = (left - v2.to(tl.float32)).to(tl.bfloat16)
            sums = tl.dot(v1, f3, sums)
            sums = tl.dot(v2, f2, sums)
            sums = tl.dot(v3, f1, sums)
            sums = tl.dot(v2, f1, sums)
        sums = tl.dot(v1, f2, sums)
        sums = tl.dot(v1, f1, sums)
    place = parts + (chunk.to(tl.int64) * tokens + token[:, None]) * (outputs + 1)
    live = (token < tokens)[:, None]
    tl.store(place + output[None, :], sums, mask=live & (output < outputs)[None, :])
    if tl.program_id(2) == 0:
        tl.store(place + outputs, tl.sum(squares, 1)[:, None], mask=live)


@triton.jit
def _summed(parts, token, tokens, outputs, place, mask, CHUNKS: tl.constexpr, TAKEN: tl.constexpr):
    """Sums of the outputs `place` [P] of one token over the chunks: TAKEN of them at once, for one wait instead of
    many, the groups in their order."""
    total = tl.zeros(place.shape, tl.float32)
    for first in tl.static_range(0, CHUNKS, TAKEN):
        chunk = first + tl.arange(0, TAKEN).to(tl.int64)
        row = parts + (chunk * tokens + token) * (outputs + 1)
        inside = (chunk < CHUNKS)[:, None] & mask[None, :]
        total += tl.sum(tl.load(row[:, None] + place[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def _scale_of(parts, token, tokens, width, outputs, eps, CHUNKS: tl.constexpr, TAKEN: tl.constexpr):
    """1 / rms of the flattened streams of one token, as [1]."""
    one = tl.arange(0, 1)
    squares = _summed(parts, token, tokens, outputs, outputs + one, one == 0, CHUNKS, TAKEN)
    return tl.rsqrt(squares / width + eps)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _collapse(streams, pre, x, token, hidden, channel, N: tl.constexpr, NP: tl.constexpr):
    """x = sum_j pre_j * streams_j over some channels of one token."""
    stream = tl.arange(0, NP)
    mixed = tl.zeros(channel.shape, tl.float32)
    for j in tl.static_range(N):
        v = tl.load(streams + (token * N + j) * hidden + channel, mask=channel < hidden, other=0.0)
        mixed += tl.sum(tl.where(stream == j, pre, 0.0)) * v.to(tl.float32)
    tl.store(x + token * hidden + channel, mixed.to(x.dtype.element_ty), mask=channel < hidden)


@triton.jit
def _mix_in(
    streams,
    parts,
    base,
    scale,
    x,
    post,
    comb,
    tokens,
    hidden,
    norm_eps,
    eps,
    iterations,
    N: tl.constexpr,
    NP: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAKEN: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token: the first program its post and comb, the others CHANNELS of its input each."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    OUTPUTS: tl.constexpr = (2 + N) * N
    stream = tl.arange(0, NP)
    inverse = _scale_of(parts, token, tokens, N * hidden, OUTPUTS, norm_eps, CHUNKS, TAKEN)
    if part > 0:
        z = _summed(parts, token, tokens, OUTPUTS, stream, stream < N, CHUNKS, TAKEN) * inverse
        pre = _sigmoid(z * tl.load(scale) + tl.load(base + stream, mask=stream < N, other=0.0)) + eps
        _collapse(streams, pre, x, token, hidden, (part - 1) * CHANNELS + tl.arange(0, CHANNELS), N, NP)
    else:
        sent = _summed(parts, token, tokens, OUTPUTS, N + stream, stream < N, CHUNKS, TAKEN) * inverse
        sent = sent * tl.load(scale + 1) + tl.load(base + N + stream, mask=stream < N, other=0.0)
        tl.store(post + token * N + stream, 2 * _sigmoid(sent), mask=stream < N)
        row, column = tl.arange(0, NP * NP) // NP, tl.arange(0, NP * NP) % NP
        inside, cell = (row < N) & (column < N), row * N + column
        logits = _summed(parts, token, tokens, OUTPUTS, 2 * N + cell, inside, CHUNKS, TAKEN) * inverse
        logits = logits * tl.load(scale + 2) + tl.load(base + 2 * N + cell, mask=inside, other=0.0)
        mixed = _doubly_stochastic(tl.reshape(logits, [NP, NP]), stream < N, eps, iterations)
        place = comb + token * N * N + stream[:, None] * N + stream[None, :]
        tl.store(place, mixed, mask=(stream < N)[:, None] & (stream < N)[None, :])


@triton.jit
def _doubly_stochastic(z, held, eps, iterations):
    """Softmax over rows [N, N], then Sinkhorn rounds that end on columns; zero where there is no stream."""
    inside = held[:, None] & held[None, :]
    z = tl.where(held[None, :], z, float("-inf"))
    z = tl.exp(z - tl.max(z, 1)[:, None])
    cells = tl.where(inside, z / tl.sum(z, 1)[:, None] + eps, 0.0)
    cells = cells / (tl.sum(cells, 0)[None, :] + eps)
    for _ in range(iterations - 1):
        cells = cells / (tl.sum(cells, 1)[:, None] + eps)
        cells = cells / (tl.sum(cells, 0)[None, :] + eps)
    return cells


@triton.jit
def _mix_head(
    streams,
    parts,
    base,
    scale,
    x,
    tokens,
    hidden,
    norm_eps,
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAKEN: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token and CHANNELS of its result."""
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, NP)
    inverse = _scale_of(parts, token, tokens, N * hidden, N, norm_eps, CHUNKS, TAKEN)
    z = _summed(parts, token, tokens, N, stream, stream < N, CHUNKS, TAKEN) * inverse
    pre = _sigmoid(z * tl.load(scale) + tl.load(base + stream, mask=stream < N, other=0.0)) + eps
    _collapse(streams, pre, x, token, hidden, tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), N, NP)


@triton.jit
def _mix_out(y, streams, post, comb, out, hidden, N: tl.constexpr, NP: tl.constexpr, CHANNELS: tl.constexpr):
    """One token: CHANNELS of all its streams."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    stream = tl.arange(0, NP)
    live = channel < hidden
    added = tl.load(y + token * hidden + channel, mask=live, other=0.0).to(tl.float32)
    mixed = tl.load(post + token * N + stream, mask=stream < N, other=0.0)[:, None] * added[None, :]
    for j in tl.static_range(N):
        by = tl.load(comb + (token * N + j) * N + stream, mask=stream < N, other=0.0)
        v = tl.load(streams + (token * N + j) * hidden + channel, mask=live, other=0.0).to(tl.float32)
        mixed += by[:, None] * v[None, :]
    place = out + (token * N + stream[:, None]) * hidden + channel[None, :]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=(stream < N)[:, None] & live[None, :])


def launches(config: ModelConfig) -> list[Launch]:
    n, hidden = config.hc_streams, config.hidden_size
    shape = f"{n} streams of {hidden}"
    product = {"streams": "*bf16", "fn": "*fp32", "parts": "*fp32", "tokens": "i32", "width": "i32", "outputs": "i32"}
    mixed = {"streams": "*bf16", "parts": "*fp32", "base": "*fp32", "scale": "*fp32", "x": "*bf16"}
    mixed |= {"tokens": "i32", "hidden": "i32", "norm_eps": "fp32", "eps": "fp32"}
    given = {"y": "*bf16", "streams": "*bf16", "post": "*fp32", "comb": "*fp32", "out": "*bf16", "hidden": "i32"}
    tile = _mix_tile(n, hidden)
    to_in = mixed | {"post": "*fp32", "comb": "*fp32", "iterations": "i32"}
    return [
        Launch("mix_in", f"{shape}, product", _project, product, _PRODUCT, PRODUCT_OPTIONS, True, ("width",)),
        Launch("mix_in", f"{shape}, Sinkhorn and sum", _mix_in, to_in, tile, OPTIONS, aligned=("hidden",)),
        Launch("mix_out", shape, _mix_out, given, _out_tile(n), OPTIONS, aligned=("hidden",)),
        Launch("mix_head", f"{shape}, sum", _mix_head, mixed, tile, OPTIONS, aligned=("hidden",)),
    ]
