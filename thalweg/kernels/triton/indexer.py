"""Indexer scores and the exact choice of the k best of them.

Scores: a program takes KEYS entries of one sequence, found through its block table, unpacks them once and multiplies
them by the heads of up to GROUP queries, one after another: keys are the rows of the product and heads its columns, so
that ReLU, weights and the sum over heads stay within a thread and its three neighbours. FP4 and FP8 codes are exact in
bfloat16, so with bfloat16 queries the only rounding is that of fp32 sums; queries are in general not exact in e4m3.

Choice: a program takes a part of a row's scores, finds the least of the k best by halving the range of values, and
writes what it chose in the order of entries: those above it and, of those equal to it, the first. What several parts
left is chosen from again, in the same order, so nothing is ever sorted. A row of 262,144 scores takes three rounds.

A row depends on itself alone: the score of a query and a key comes from one product of a fixed tile, whichever tile and
row it lies in, and the choice is exact whatever the parts are. Scores lie in a workspace of one fixed size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError
from thalweg.kernels.arguments import Packing, PagedRows, Segments
from thalweg.kernels.reference import indexer as reference
from thalweg.kernels.triton.launch import Launch

SCORES = 1 << 24  # fp32 scores at a time, 64 MiB: 64 queries of a million tokens each, or 1024 of 65,536
KEYS = 128  # entries of a product: two or three blocks of four warps then fit a multiprocessor
GROUP = 16  # queries that an unpacked tile of keys serves: unpacking costs about as much as six of them
PROGRAMS = 512  # over which the tiles of single queries are spread: about four for each multiprocessor
# Without fusion of products into sums: the compiler fuses some in one copy of the loop's body and not in another.
SCORE_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
SMALL, PART = 2048, 8192  # scores that one program chooses from: all of a short context, or a part; 16 in each thread
_PLAIN, _FP8, _FP4 = 0, 1, 2
_FORMATS = {Packing.PLAIN: _PLAIN, Packing.FP8_INDEX: _FP8, Packing.FP4_INDEX: _FP4}
_INDEX_BLOCK = 32  # elements under one scale of an FP4 key


def index_topk(query: Tensor, weights: Tensor, keys: PagedRows, queries: Segments, ratio: int, k: int) -> Tensor:
    if keys.rows.packing not in _FORMATS:  # KV rows are no index keys of any model
        return reference.index_topk(query, weights, keys, queries, ratio, k)
    if k > PART // 2:  # a part must leave fewer than it was
        raise ConfigError(
            f"index_topk is {k}: the Triton kernels choose {PART // 2} entries at most", param="index_topk"
        )
    rows = query.shape[0]
    result = torch.empty((rows, k), dtype=torch.int64, device=query.device)
    if rows == 0 or k == 0:
        return result
    width = max(16, triton.cdiv(_most_visible(queries, ratio, 0, rows), 16) * 16)
    scores = torch.empty(max(SCORES, width), dtype=torch.float32, device=query.device)
    asked = Rows(query.contiguous(), weights.float().contiguous(), keys, queries, ratio, k)
    for first in range(0, rows, len(scores) // width):
        stop = min(rows, first + len(scores) // width)
        most = _most_visible(queries, ratio, first, stop)
        if most > k:
            asked.score(scores, width, first, stop, most)
        asked.choose(scores, width, first, stop, most, result)
    return result


def _most_visible(queries: Segments, ratio: int, first: int, stop: int) -> int:
    """Entries that the last query of any sequence sees, of the rows first to stop - 1."""
    ends = zip(queries.starts, queries.offsets, queries.offsets[1:], strict=False)
    seen = (start + min(end, stop) - begin for start, begin, end in ends if begin < stop and max(begin, first) < end)
    return max(seen, default=0) // ratio


@dataclass(frozen=True, slots=True)
class Rows:
    """The arguments of index_topk, of which both kernels are launched on a range of rows."""

    query: Tensor
    weights: Tensor
    keys: PagedRows
    queries: Segments
    ratio: int
    k: int

    def score(self, scores: Tensor, width: int, first: int, stop: int, most: int) -> None:
        """Scores of the rows first to stop - 1 with all that they see, row by row, `width` apart."""
        device, sequences, rows = self.query.device, len(self.queries), self.keys.rows
        group = 1 if self.query.shape[0] == sequences else GROUP
        groups, tiles = (stop - first + sequences * (group - 1)) // group, triton.cdiv(most, KEYS)
        span = triton.cdiv(tiles * groups, PROGRAMS) if group == 1 else 1
        constants = score_constants(
            (self.query.shape[1], self.query.shape[2]), rows.packing, (rows.data.stride(0), self.keys.rows_per_block),
            (self.ratio, self.k), group=group, exact=torch.float32 in (self.query.dtype, rows.data.dtype),
        )  # fmt: skip
        _score[(triton.cdiv(tiles, span), groups)](
            self.query, self.weights, rows.data, self.keys.blocks, self.keys.offsets.on(device),
            self.queries.offsets.on(device), self.queries.starts.on(device), scores, sequences, first, stop, width,
            span, **constants, **SCORE_OPTIONS,
        )  # fmt: skip

    def choose(self, scores: Tensor, width: int, first: int, stop: int, most: int, result: Tensor) -> None:
        device, pool = self.query.device, scores
        for level, (constants, parts) in enumerate(choices(self.ratio, self.k, most)):
            size = (stop - first) * parts * self.k
            chosen = result if constants["LAST"] else pool.new_empty(size, dtype=torch.int64)
            _choose[(parts, stop - first)](
                pool, chosen, self.queries.offsets.on(device), self.queries.starts.on(device), len(self.queries), first,
                width, level, **constants, num_warps=choose_warps(constants["BLOCK"]),
            )  # fmt: skip
            pool, width = chosen, parts * self.k


def choices(ratio: int, k: int, most: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Constants and number of parts of each level of a choice among `most` scores."""
    for level in itertools.count():
        last, block = most <= PART, SMALL if most <= SMALL else PART
        parts = max(1, triton.cdiv(most, block))
        yield {"RATIO": ratio, "TOP": k, "PART": PART, "BLOCK": block, "FIRST": level == 0, "LAST": last}, parts
        if last:
            return
        most = (parts - 1) * k + min(k, most - (parts - 1) * block)


def score_constants(
    query: tuple[int, int],
    packing: Packing,
    pool: tuple[int, int],
    choice: tuple[int, int],
    *,
    group: int,
    exact: bool,
) -> dict[str, Any]:
    """`query` is heads and width, `pool` elements from row to row and rows of a block, `choice` ratio and k.

    `exact`: products of fp32 numbers, not of bfloat16 on tensor cores.
    """
    (heads, width), (row_stride, block_rows), (ratio, k) = query, pool, choice
    least = _INDEX_BLOCK if packing is Packing.FP4_INDEX else 16
    return {
        "HEADS": heads,
        "WIDTH": width,
        "HEAD_TILE": max(16, triton.next_power_of_2(heads)),
        "WIDTH_TILE": max(least, triton.next_power_of_2(width)),
        "FORMAT": _FORMATS[packing],
        "ROW_STRIDE": row_stride,
        "BLOCK_ROWS": block_rows,
        "RATIO": ratio,
        "TOP": k,
        "KEYS": KEYS,
        "GROUP": group,
        "EXACT": exact,
    }


def choose_warps(block: int) -> int:
    """16 scores in a thread's registers: with more of them a scan spills."""
    return block // 512


def launches(config: ModelConfig) -> list[Launch]:
    return [*_score_launches(config), *_choose_launches(config)]


def _score_launches(config: ModelConfig) -> Iterator[Launch]:
    width, block_rows = config.index_head_dim, config.unit_tokens // config.csa_ratio
    strides = {
        Packing.PLAIN: ("*bf16", width),
        Packing.FP8_INDEX: ("*u8", width + 4),
        Packing.FP4_INDEX: ("*u8", width // 2 + width // _INDEX_BLOCK),
    }
    for packing, (pointer, stride) in strides.items():
        for group in (1, GROUP):
            constants = score_constants(
                (config.index_heads, width), packing, (stride, block_rows), (config.csa_ratio, config.index_topk),
                group=group, exact=False,
            )  # fmt: skip
            yield Launch(
                op="index_topk",
                what=f"scores of {packing.value} keys, {group} queries of {config.index_heads} heads of {width}",
                kernel=_score,
                types={
                    "query": "*bf16",
                    "weights": "*fp32",
                    "keys": pointer,
                    **dict.fromkeys(("blocks", "block_offsets", "offsets", "starts"), "*i64"),
                    "scores": "*fp32",
                    **dict.fromkeys(("sequences", "first", "stop", "score_stride", "span"), "i32"),
                },
                constants=constants,
                options=SCORE_OPTIONS,
                matrix=True,
                aligned=("score_stride",),
            )


def _choose_launches(config: ModelConfig) -> Iterator[Launch]:
    """Of contexts of every power of two that the model may have."""
    most = config.max_position_embeddings // config.csa_ratio
    every = [c for n in range(most.bit_length()) for c, _ in choices(config.csa_ratio, config.index_topk, most >> n)]
    for number, constants in enumerate(every):
        block, begins = constants["BLOCK"], constants["FIRST"]
        if constants in every[:number]:
            continue
        yield Launch(
            op="index_topk",
            what=f"the best of {'up to' if constants['LAST'] else 'each'} {block:,} {'scores' if begins else 'chosen'}",
            kernel=_choose,
            types={
                "pool": "*fp32" if begins else "*i64",
                **dict.fromkeys(("chosen", "offsets", "starts"), "*i64"),
                **dict.fromkeys(("sequences", "first", "pool_stride", "level"), "i32"),
            },
            constants=constants,
            options={"num_warps": choose_warps(block)},
            aligned=("pool_stride",) if begins or config.index_topk % 16 == 0 else (),
        )


@triton.jit
def _group_of(offsets, sequence, first, stop, GROUP: tl.constexpr):
    """The number of the first group of a sequence, if each has groups of its own of the rows first to stop - 1."""
    begin = tl.load(offsets + sequence).to(tl.int32)
    return (tl.minimum(tl.maximum(begin, first), stop) - first + sequence * (GROUP - 1)) // GROUP


@triton.jit
def _sequence_of(offsets, sequences, group, first, stop, GROUP: tl.constexpr):
    """The last sequence whose groups begin at `group` or before."""
    low = group * 0
    high = sequences - 1 + low
    while low < high:
        middle = (low + high + 1) // 2
        inside = _group_of(offsets, middle, first, stop, GROUP) <= group
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    return low


@triton.jit
def _visible(offsets, starts, sequence, row, RATIO: tl.constexpr):
    """How many entries a row of a sequence sees."""
    before = tl.load(starts + sequence) - tl.load(offsets + sequence)
    return ((before + row + 1) // RATIO).to(tl.int32)


@triton.jit
def _fp4(codes, exponents, KEYS: tl.constexpr, WIDTH_TILE: tl.constexpr):
    """Pairs of e2m1 [keys, blocks, 16] under UE8M0 [keys, blocks] -> fp32 [keys, width], exact."""
    both = tl.join(codes & 15, codes >> 4).to(tl.int32)
    bits = ((both & 7) << 22) | ((both & 8) << 28)  # e2m1 in the place of e8m23: 2^126 too small, 0.5 subnormal
    values = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    power = exponents.to(tl.int32) << 23
    power = tl.where(exponents == 0, 0x00400000, tl.where(exponents == 255, 0x7FC00000, power))
    values = values * power.to(tl.float32, bitcast=True)[:, :, None, None]
    return tl.reshape(values, [KEYS, WIDTH_TILE])


@triton.jit
def _fp8_scale(bytes, there):
    """fp32 of four bytes that need not be aligned."""
    bits = tl.load(bytes, mask=there, other=0).to(tl.uint32)
    bits |= tl.load(bytes + 1, mask=there, other=0).to(tl.uint32) << 8
    bits |= tl.load(bytes + 2, mask=there, other=0).to(tl.uint32) << 16
    bits |= tl.load(bytes + 3, mask=there, other=0).to(tl.uint32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _unpacked(
    rows,
    there,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Keys [KEYS, WIDTH_TILE] at the pointers `rows`, in fp32 or bfloat16, and their scales fp32 [KEYS]."""
    scales = tl.full([KEYS], 1.0, tl.float32)
    column = tl.arange(0, WIDTH_TILE)
    if FORMAT == 2:
        block, pair = tl.arange(0, WIDTH_TILE // 32), tl.arange(0, 16)
        byte = block[:, None] * 16 + pair[None, :]
        inside = there[:, None, None] & (byte < WIDTH // 2)[None, :, :]
        codes = tl.load(rows[:, None, None] + byte[None, :, :], mask=inside, other=0)
        scaled = there[:, None] & (block * 32 < WIDTH)[None, :]
        exponents = tl.load(rows[:, None] + (WIDTH // 2 + block)[None, :], mask=scaled, other=0)
        keys = _fp4(codes, exponents, KEYS, WIDTH_TILE)
    else:
        inside = there[:, None] & (column < WIDTH)[None, :]
        raw = tl.load(rows[:, None] + column[None, :], mask=inside, other=0)
        if FORMAT == 1:
            scales = _fp8_scale(rows + WIDTH, there)
            keys = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            if EXACT:  # as the reference reads them
                keys = keys * scales[:, None]
                scales = tl.full([KEYS], 1.0, tl.float32)
        else:
            keys = raw.to(tl.float32)
    return keys if EXACT else keys.to(tl.bfloat16), scales


@triton.jit
def _tile(
    keys,
    blocks,
    tile,
    seen,
    FORMAT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Keys and scales of the entries of a tile, as the block table has them."""
    entry = tile * KEYS + tl.arange(0, KEYS)
    there = entry < seen
    block = tl.load(blocks + entry // BLOCK_ROWS, mask=there, other=0)
    rows = keys + (block * BLOCK_ROWS + entry % BLOCK_ROWS) * ROW_STRIDE
    return _unpacked(rows, there, FORMAT, WIDTH, KEYS, WIDTH_TILE, EXACT)


@triton.jit
def _scored(keys, scales, asked, weight, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, EXACT: tl.constexpr):
    """fp32 [keys]: sum_h weight_h * relu(asked_h . key)."""
    if EXACT:
        products = tl.dot(keys, tl.trans(asked.to(tl.float32)), input_precision="ieee")
    else:
        products = tl.dot(keys, tl.trans(asked))
    terms = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
    if HEADS < HEAD_TILE:  # an infinite key makes NaN of the zeros beside the heads
        terms = tl.where((tl.arange(0, HEAD_TILE) < HEADS)[None, :], terms, 0.0)
    return tl.sum(terms, 1) * scales


@triton.jit(do_not_specialize=["sequences", "first", "stop", "span"])
def _score(
    query,
    weights,
    keys,
    blocks,
    block_offsets,
    offsets,
    starts,
    scores,
    sequences,
    first,
    stop,
    score_stride,
    span,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    RATIO: tl.constexpr,
    TOP: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Program (tiles, group): `span` tiles of entries for one query, or one tile for up to GROUP queries of a sequence.

    Groups are made of the rows first to stop - 1.
    """
    group = tl.program_id(1)
    sequence = _sequence_of(offsets, sequences, group, first, stop, GROUP)
    begin = tl.maximum(tl.load(offsets + sequence).to(tl.int32), first)
    end = tl.minimum(tl.load(offsets + sequence + 1).to(tl.int32), stop)
    begin += (group - _group_of(offsets, sequence, first, stop, GROUP)) * GROUP
    end = tl.minimum(end, begin + GROUP)
    if begin >= end:
        return
    seen = _visible(offsets, starts, sequence, end - 1, RATIO)
    low = tl.program_id(0) * span
    high = tl.minimum(low + span, (seen + KEYS - 1) // KEYS)
    if (low >= high) | (seen <= TOP):  # what is all chosen needs no score
        return
    blocks += tl.load(block_offsets + sequence)
    head, column = tl.arange(0, HEAD_TILE), tl.arange(0, WIDTH_TILE)
    place = head[:, None] * WIDTH + column[None, :]
    inside = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
    query += begin.to(tl.int64) * (HEADS * WIDTH)
    weights += begin * HEADS
    scores += (begin - first).to(tl.int64) * score_stride
    if GROUP == 1:
        asked = tl.load(query + place, mask=inside, other=0.0)
        weight = tl.load(weights + head, mask=head < HEADS, other=0.0)
        for tile in range(low, high):
            rows, scales = _tile(
                keys, blocks, tile, seen, FORMAT, ROW_STRIDE, BLOCK_ROWS, WIDTH, KEYS, WIDTH_TILE, EXACT
            )
            entry = tile * KEYS + tl.arange(0, KEYS)
            tl.store(scores + entry, _scored(rows, scales, asked, weight, HEADS, HEAD_TILE, EXACT), mask=entry < seen)
    else:
        rows, scales = _tile(keys, blocks, low, seen, FORMAT, ROW_STRIDE, BLOCK_ROWS, WIDTH, KEYS, WIDTH_TILE, EXACT)
        entry = low * KEYS + tl.arange(0, KEYS)
        for row in range(end - begin):
            asked = tl.load(query + row * (HEADS * WIDTH) + place, mask=inside, other=0.0)
            weight = tl.load(weights + row * HEADS + head, mask=head < HEADS, other=0.0)
            score = _scored(rows, scales, asked, weight, HEADS, HEAD_TILE, EXACT)
            tl.store(scores + row * score_stride + entry, score, mask=entry < seen)


@triton.jit
def _ordered(score):
    """uint32 in the order of scores, never 0: the two zeros are one score, NaN is one score above all others."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FC00000, bits)
    return (bits ^ (((bits >> 31) & 0x7FFFFFFF) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _least(rank, there, wanted, found):
    """The rank that the `wanted` best reach, of `found` in all, or a lower one that no other does."""
    low = tl.min(tl.where(there, rank, 0xFFFFFFFF), 0)
    high = tl.max(rank, 0)
    while (low < high) & (found != wanted):
        middle = high - (high - low) // 2
        reaching = tl.sum((rank >= middle).to(tl.int32), 0)
        enough = reaching >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        found = tl.where(enough, reaching, found)
    return low


@triton.jit(do_not_specialize=["sequences", "first", "level"])
def _choose(
    pool,
    chosen,
    offsets,
    starts,
    sequences,
    first,
    pool_stride,
    level,
    RATIO: tl.constexpr,
    TOP: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Program (part, row): the TOP best of BLOCK numbers of `pool`, in their order, to `chosen`.

    At first `pool` has scores by entry, else numbers of the level before: rank and entry in one int64. The last level
    writes entries alone, of row first + row.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(offsets, sequences, row, first, 0x7FFFFFFF, 1)
    count = _visible(offsets, starts, sequence, first + row, RATIO)
    if count <= TOP:
        if LAST:
            for begin in range(0, TOP, BLOCK):
                place = begin + tl.arange(0, BLOCK)
                entry = tl.maximum(place - (TOP - count), -1).to(tl.int64)
                tl.store(chosen + (first + row).to(tl.int64) * TOP + place, entry, mask=place < TOP)
        return
    for _ in range(level):  # each part but the last has left TOP numbers
        full = (count + PART - 1) // PART - 1
        count = full * TOP + tl.minimum(TOP, count - full * PART)
    if part * BLOCK >= count:
        return
    place = part * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    pool += row.to(tl.int64) * pool_stride
    if FIRST:
        rank = _ordered(tl.load(pool + place, mask=there, other=0.0))
    else:
        rank = (tl.load(pool + place, mask=there, other=0) >> 32).to(tl.uint32)
    rank = tl.where(there, rank, 0)
    wanted = tl.minimum(TOP, count - part * BLOCK)
    least = _least(rank, there, wanted, tl.minimum(BLOCK, count - part * BLOCK))
    # How many up to each place are above `least`, in the upper half, and equal to it, in the lower.
    counts = tl.cumsum(tl.where(rank > least, 1 << 16, ((rank == least) & there).to(tl.int32)), 0)
    spare = wanted - tl.sum((rank > least).to(tl.int32), 0)
    keep = (rank > least) | ((rank == least) & there & ((counts & 0xFFFF) <= spare))
    slot = (counts >> 16) + tl.minimum(counts & 0xFFFF, spare) - 1
    number = place.to(tl.int64) if FIRST else tl.load(pool + place, mask=keep, other=0)  # again: registers are few
    if LAST:
        tl.store(chosen + (first + row).to(tl.int64) * TOP + slot, number & 0xFFFFFFFF, mask=keep)
    else:
        if FIRST:
            number |= rank.to(tl.int64) << 32
        tl.store(chosen + (row.to(tl.int64) * tl.num_programs(0) + part) * TOP + slot, number, mask=keep)
