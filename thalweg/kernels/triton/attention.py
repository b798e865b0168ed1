"""Attention over window, compressed entries and sink: one program per query, group of heads and run of chunks.

The keys of a query are a list: its window, oldest first, then its entries (all visible ones, or the selected ones in the
order given). Tiles of the list make chunks of a fixed length. Within a chunk the softmax is accumulated tile by tile
from nothing; chunks are then folded into a running total that starts from the sink, in their order.

A few queries (decoding) have one program per chunk: each writes its part to a workspace, and a second kernel folds.
Many queries (prefill) have one program for all chunks, which folds into the result's own row after each. Both compute
the same chunks by the very same compiled kernel and fold them by the same explicit multiply-adds, so which of the two
it was cannot be seen in the result. Nor can anything else: the list, its tiles and its chunks follow from the query's
own position, and heads and queries never meet in a sum. That is why a row's bits do not depend on its company.

The workspace is a fixed number of parts, however long the context; queries take turns in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import AttentionContext
from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.stored import FP8_KV, PLAIN, RowForm, load_rows, over_rows, packed_bytes, placed

WINDOW, SELECTED, ALL = 0, 1, 2
# Entries per chunk. Long chunks cost decoding parallelism, short ones cost prefill a fold each: 256 KiB through the L2
# cache, some 2 us of a multiprocessor, where 64 entries take about as long.
CHUNK = {WINDOW: 256, SELECTED: 256, ALL: 512}
TILE_ELEMENTS = 1 << 14  # of a tile of rows: 32 rows of 512; a larger one exceeds B200's shared memory
MOST_TILE_ROWS = 128
MOST_HEADS = 64  # of a program: the least that Hopper's and Blackwell's tensor cores take, and 64 x 512 fp32 fill TMEM
MOST_HEADS_FP32 = 16  # without tensor cores: what registers hold
PARTS = 512  # of the workspace: 64 MiB at 64 heads x 512
WALKING_PROGRAMS = 128  # from here on whole queries fill the multiprocessors (132 of an H100, 148 of a B200)
FOLDED_AT_ONCE = 8  # parts whose loads are under way together
FOLD_WARPS = 4
LOG2_E = 1.4426950408889634
_SEQUENCES_AT_ONCE = 256

_OFFSETS = ("query_offsets", "query_starts", "key_offsets", "key_starts", "past_offsets", "entry_offsets")
_FLOATS = ("sinks", "out", "parts", "summaries")
_WINDOW, _ALL = tl.constexpr(WINDOW), tl.constexpr(ALL)
_FLOOR = tl.constexpr(-1e30)  # a maximum over nothing: unlike -inf its difference from itself is 0
_LOG2_E = tl.constexpr(LOG2_E)
_AT_ONCE = tl.constexpr(_SEQUENCES_AT_ONCE)


@triton.jit
def _sequence_of(offsets, sequences, row):
    """The sequence that owns a row: as many end at or before it as have lower numbers."""
    before = 0
    for begin in range(0, sequences, _AT_ONCE):
        s = begin + tl.arange(0, _AT_ONCE)
        ends = tl.load(offsets + 1 + s, mask=s < sequences, other=row + 1)
        before += tl.sum((ends <= row).to(tl.int32), 0)
    return before


@triton.jit
def _folded(maximum, denominator, m, l, last):
    """Maximum and denominator with those of one more chunk, and the factors of the old total and of the chunk; with
    the last one the total becomes the result."""
    top = tl.maximum(maximum, m)
    old, new = tl.exp2(maximum - top), tl.exp2(m - top)
    denominator = tl.fma(denominator, old, l * new)
    share = tl.where(last, 1.0 / denominator, 1.0)
    return top, denominator, old * share, new * share


@triton.jit
def _taken_in(q, rows, seen, scale, always, m, l, acc):
    """The softmax of a chunk with one more tile of rows [T, d]."""
    s = tl.dot(q, tl.trans(rows), input_precision="ieee")
    p, faded = tl.zeros_like(s), m
    if always:
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(tl.fma(s, scale, -top[:, None]))
        faded = tl.exp2(m - top)
        m = top
        l = tl.fma(l, faded, tl.sum(p, 1))
    acc = tl.dot(p.to(rows.dtype), rows, acc * faded[:, None], input_precision="ieee")
    return m, l, acc


@triton.jit
def _quarters(acc, HEADS_AT_ONCE: tl.constexpr, PADDED: tl.constexpr):
    """An accumulator [H, d] as four of [H, d / 4]: a program that reads a total back cannot hold all of both at once.

    The columns of quarter 2 i + j are (i, any, j, any) as bits; threads keep the values that they have.
    """
    low, high = tl.split(tl.permute(tl.reshape(acc, [HEADS_AT_ONCE, 2, 2, PADDED // 4]), [0, 1, 3, 2]))
    a, b = tl.split(tl.permute(tl.reshape(low, [HEADS_AT_ONCE, 2, 2, PADDED // 8]), [0, 1, 3, 2]))
    c, d = tl.split(tl.permute(tl.reshape(high, [HEADS_AT_ONCE, 2, 2, PADDED // 8]), [0, 1, 3, 2]))
    return a, b, c, d


@triton.jit
def _columns(QUARTER: tl.constexpr, PADDED: tl.constexpr):
    """[2, d / 8]: the columns of a quarter."""
    START: tl.constexpr = (QUARTER // 2) * (PADDED // 4) + (QUARTER % 2) * (PADDED // 8)
    return tl.arange(0, 2)[:, None] * (PADDED // 2) + START + tl.arange(0, PADDED // 8)[None, :]


@triton.jit
def _add(
    at,
    acc,
    QUARTER: tl.constexpr,
    old_factor,
    factor,
    again,
    heads,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A quarter of a chunk's sum into the total that lies at `at`."""
    head = tl.arange(0, acc.shape[0])[:, None, None]
    column = _columns(QUARTER, PADDED)[None, :, :]
    at += head * WIDTH + column
    if EVEN:
        total = tl.load(at, mask=again, other=0.0)
        total = tl.fma(total, old_factor[:, None, None], acc * factor[:, None, None])
        tl.store(at, total)
    else:
        kept = (head < heads) & (column < WIDTH)
        total = tl.load(at, mask=kept & again, other=0.0)
        total = tl.fma(total, old_factor[:, None, None], acc * factor[:, None, None])
        tl.store(at, total, mask=kept)


@triton.jit
def _put(at, acc, QUARTER: tl.constexpr, PADDED: tl.constexpr):
    """A quarter of a chunk's sum into the workspace."""
    tl.store(at + (tl.arange(0, acc.shape[0])[:, None, None] * PADDED + _columns(QUARTER, PADDED)[None, :, :]), acc)


@triton.jit
def _finished(
    row_at,  # the query's part of `out`
    parts,
    summaries,
    part,
    chunk,
    count,
    heads,
    maximum,
    denominator,
    m,
    l,
    acc,
    ALONE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A chunk done: fold it into the total, or leave it in the workspace. Returns maximum and denominator so far."""
    HEADS_AT_ONCE: tl.constexpr = acc.shape[0]
    a, b, c, d = _quarters(acc, HEADS_AT_ONCE, PADDED)
    if ALONE or tl.num_programs(1) == 1:
        maximum, denominator, old, new = _folded(maximum, denominator, m, l, chunk + 1 == count)
        again = (chunk > 0) & (not ALONE)
        if not ALONE:
            tl.debug_barrier()  # threads read back what others of this program wrote
        _add(row_at, a, 0, old, new, again, heads, EVEN, WIDTH, PADDED)
        _add(row_at, b, 1, old, new, again, heads, EVEN, WIDTH, PADDED)
        _add(row_at, c, 2, old, new, again, heads, EVEN, WIDTH, PADDED)
        _add(row_at, d, 3, old, new, again, heads, EVEN, WIDTH, PADDED)
    else:
        at = parts + part.to(tl.int64) * (HEADS_AT_ONCE * PADDED)
        _put(at, a, 0, PADDED)
        _put(at, b, 1, PADDED)
        _put(at, c, 2, PADDED)
        _put(at, d, 3, PADDED)
        inner = tl.arange(0, HEADS_AT_ONCE)
        tl.store(summaries + part * 2 * HEADS_AT_ONCE + inner, m)
        tl.store(summaries + (part * 2 + 1) * HEADS_AT_ONCE + inner, l)
    return maximum, denominator


@triton.jit(
    do_not_specialize=["past_shift", "entry_shift", "sequences", "first_query", "chosen", "chunks", "run"],
    do_not_specialize_on_alignment=["past_slots", "blocks"],
)
def attend(
    query,  # [Q, H, d]
    new_rows,  # [T, d]
    sinks,  # [H]
    out,  # fp32 [Q, H, d]
    past_rows,
    past_shift,
    past_slots,
    entry_rows,
    entry_shift,
    blocks,
    selected,  # int64 [Q, chosen]
    query_offsets,
    query_starts,
    key_offsets,
    key_starts,
    past_offsets,
    entry_offsets,
    parts,  # fp32 [PARTS, HEADS_AT_ONCE, PADDED]
    summaries,  # fp32 [PARTS, 2, HEADS_AT_ONCE]: maximum and denominator of each part
    counts,  # int32 [PARTS]: chunks of each query and group
    sequences,
    first_query,  # of this launch
    chosen,
    chunks,  # parts that each query and group has in the workspace
    run,  # chunks of a program
    scale,
    MODE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    RATIO: tl.constexpr,  # tokens per entry
    BLOCK_ROWS: tl.constexpr,  # entries per block
    PAST_FORM: tl.constexpr,
    PAST_STRIDE: tl.constexpr,
    PAST_ROPE: tl.constexpr,
    ENTRY_FORM: tl.constexpr,
    ENTRY_STRIDE: tl.constexpr,
    ENTRY_ROPE: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    GROUPS: tl.constexpr = (HEADS + HEADS_AT_ONCE - 1) // HEADS_AT_ONCE
    EVEN: tl.constexpr = HEADS % HEADS_AT_ONCE == 0 and WIDTH == PADDED
    place = tl.program_id(0)
    row, group = first_query + place // GROUPS, place % GROUPS
    s = _sequence_of(query_offsets, sequences, row)
    position = (tl.load(query_starts + s) + row - tl.load(query_offsets + s)).to(tl.int32)

    # Chunk 0 is the window; entries begin with chunk 1.
    entries = 0
    if MODE == _ALL:
        entries = (position + 1) // RATIO
    elif MODE != _WINDOW:
        entries = chosen
    count = 1 + (entries + CHUNK - 1) // CHUNK
    first, last = 0, 1
    if MODE != _WINDOW:
        first = tl.program_id(1) * run
        last = tl.minimum(first + run, count)
        if (first == 0) & (tl.num_programs(1) > 1):
            tl.store(counts + place, count)
        if first >= count:
            return

    head = group * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    column = tl.arange(0, PADDED)
    row_at = (row.to(tl.int64) * HEADS + group * HEADS_AT_ONCE) * WIDTH
    heads = HEADS - group * HEADS_AT_ONCE
    q_at = query + row_at + tl.arange(0, HEADS_AT_ONCE)[:, None] * WIDTH + column[None, :]
    q = tl.load(q_at, mask=(head < HEADS)[:, None] & (column < WIDTH)[None, :], other=0.0)
    maximum = tl.maximum(tl.load(sinks + head, mask=head < HEADS, other=0.0).to(tl.float32) * _LOG2_E, _FLOOR)
    denominator = tl.full([HEADS_AT_ONCE], 1.0, tl.float32)
    lane = tl.arange(0, TILE)
    part = place * chunks

    for chunk in tl.range(first, last, disable_licm=True):
        m = tl.full([HEADS_AT_ONCE], _FLOOR, tl.float32)
        l = tl.zeros([HEADS_AT_ONCE], tl.float32)
        acc = tl.zeros([HEADS_AT_ONCE, PADDED], tl.float32)
        if chunk == 0:
            new_first = tl.load(key_starts + s).to(tl.int32)
            before_new = tl.load(key_offsets + s).to(tl.int32) - new_first
            past_offset = tl.load(past_offsets + s)
            oldest = new_first - (tl.load(past_offsets + s + 1) - past_offset).to(tl.int32)
            past_slots += past_offset - oldest
            # The window ends at the query's own position; what is before the sequence, or gone already, is skipped.
            WINDOW_TILES: tl.constexpr = (WINDOW_ROWS + TILE - 1) // TILE
            origin = position + 1 - WINDOW_TILES * TILE
            lowest = tl.maximum(oldest, position + 1 - WINDOW_ROWS)
            for tile in tl.range((lowest - origin) // TILE, WINDOW_TILES, num_stages=1, disable_licm=True):
                at_position = origin + tile * TILE + lane
                seen = at_position >= lowest
                new = seen & (at_position >= new_first)
                slots = tl.load(past_slots + at_position, mask=seen & (at_position < new_first), other=-1)
                old = slots >= 0
                rows = load_rows(
                    past_rows, past_shift, slots, old, PAST_FORM, PAST_STRIDE, PAST_ROPE, WIDTH, PADDED, q.dtype
                )
                rows = over_rows(rows, new_rows, before_new + at_position, new, WIDTH, PADDED)
                m, l, acc = _taken_in(q, rows, new | old, scale, run > 0, m, l, acc)
        elif MODE != _WINDOW:
            begin = (chunk - 1) * CHUNK
            own_blocks = blocks + tl.load(entry_offsets + s)
            for start in tl.range(begin, tl.minimum(begin + CHUNK, entries), TILE, disable_licm=True):
                number = start + lane
                if MODE == _ALL:
                    entry = number
                    seen = number < entries
                else:
                    entry = tl.load(selected + row.to(tl.int64) * chosen + number, mask=number < chosen, other=-1)
                    entry = entry.to(tl.int32)
                    seen = entry >= 0
                block = tl.load(own_blocks + entry // BLOCK_ROWS, mask=seen, other=0)
                slots = block * BLOCK_ROWS + entry % BLOCK_ROWS
                rows = load_rows(
                    entry_rows, entry_shift, slots, seen, ENTRY_FORM, ENTRY_STRIDE, ENTRY_ROPE, WIDTH, PADDED, q.dtype
                )
                m, l, acc = _taken_in(q, rows, seen, scale, run > 0, m, l, acc)
        maximum, denominator = _finished(
            out + row_at, parts, summaries, part + chunk, chunk, count, heads, maximum, denominator, m, l, acc,
            MODE == _WINDOW, EVEN, WIDTH, PADDED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_query", "chunks"])
def fold(
    sinks,
    out,
    parts,
    summaries,
    counts,
    first_query,
    chunks,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One head of one query: its parts in their order, into the sink."""
    GROUPS: tl.constexpr = (HEADS + HEADS_AT_ONCE - 1) // HEADS_AT_ONCE
    head = tl.program_id(1)
    inner = head % HEADS_AT_ONCE
    place = tl.program_id(0) * GROUPS + head // HEADS_AT_ONCE
    column = tl.arange(0, PADDED)
    maximum = tl.maximum(tl.load(sinks + head).to(tl.float32) * _LOG2_E, _FLOOR)
    denominator = tl.full((), 1.0, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    count = tl.load(counts + place)
    for chunk in tl.range(0, count, loop_unroll_factor=AT_ONCE):
        part = place * chunks + chunk
        m = tl.load(summaries + part * 2 * HEADS_AT_ONCE + inner)
        l = tl.load(summaries + (part * 2 + 1) * HEADS_AT_ONCE + inner)
        acc = tl.load(parts + (part.to(tl.int64) * HEADS_AT_ONCE + inner) * PADDED + column)
        maximum, denominator, old_factor, factor = _folded(maximum, denominator, m, l, chunk + 1 == count)
        total = tl.fma(total, old_factor, acc * factor)
    row = (first_query + tl.program_id(0)).to(tl.int64)
    tl.store(out + (row * HEADS + head) * WIDTH + column, total, mask=column < WIDTH)


@dataclass(frozen=True, slots=True)
class Shape:
    """Tiles of a layer: the same for every query that it will ever have."""

    mode: int
    heads: int
    width: int
    window: int
    ratio: int
    block_rows: int
    past: RowForm
    entry: RowForm
    narrow: bool  # bfloat16 queries

    @property
    def heads_at_once(self) -> int:
        most = MOST_HEADS if self.narrow else MOST_HEADS_FP32
        return min(most, max(16, triton.next_power_of_2(self.heads)))

    @property
    def groups(self) -> int:
        return -(-self.heads // self.heads_at_once)

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.width))

    @property
    def tile(self) -> int:
        return max(16, min(MOST_TILE_ROWS, TILE_ELEMENTS // self.padded))

    def chunks(self, entries: int) -> int:
        """Of a query that has so many entries in its list."""
        return 1 + -(-entries // CHUNK[self.mode])

    def attend_constants(self) -> dict[str, int]:
        return {
            "MODE": self.mode,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "WINDOW_ROWS": self.window,
            "RATIO": self.ratio,
            "BLOCK_ROWS": self.block_rows,
            **self.past.constants("PAST"),
            **self.entry.constants("ENTRY"),
            "HEADS_AT_ONCE": self.heads_at_once,
            "PADDED": self.padded,
            "TILE": self.tile,
            "CHUNK": CHUNK[self.mode],
        }

    def fold_constants(self) -> dict[str, int]:
        return {
            "HEADS": self.heads,
            "WIDTH": self.width,
            "HEADS_AT_ONCE": self.heads_at_once,
            "PADDED": self.padded,
            "AT_ONCE": FOLDED_AT_ONCE,
        }

    def options(self) -> dict[str, int]:
        """8 warps hold 64 x 512 accumulators in 128 registers each."""
        wide = self.heads_at_once * self.padded >= 1 << 14
        return {"num_warps": 8 if wide else 4, "num_stages": 2}


def attention(
    query: Tensor, new_rows: Tensor, context: AttentionContext, sinks: Tensor, selected: Tensor | None
) -> Tensor:
    query, new_rows, sinks = query.contiguous(), new_rows.contiguous(), sinks.contiguous()
    queries, heads, width = query.shape
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    if queries == 0:
        return out
    past = placed(context.past.rows)
    entry = past if context.entries is None else placed(context.entries.rows)
    shape = _shape(query, context, past.form, entry.form, selected is not None)
    most = shape.chunks(_longest(context, selected))
    per_query = most * shape.groups
    walks = most == 1 or queries * shape.groups >= WALKING_PROGRAMS or per_query > PARTS
    space = _workspace(shape, out) if not walks else (out, out, out)
    step = queries if walks else PARTS // per_query
    for first in range(0, queries, step):
        rows = min(step, queries - first)
        attend[(rows * shape.groups, 1 if walks else most)](
            query, new_rows, sinks, out, past.data, past.shift, context.past.slots, entry.data, entry.shift,
            *_lists(context, selected), *_segments(context), *space,
            len(context.queries), first, 0 if selected is None else selected.shape[1], most, most if walks else 1,
            width**-0.5 * LOG2_E, **shape.attend_constants(), **shape.options(),
        )  # fmt: skip
        if not walks:
            fold[(rows, heads)](sinks, out, *space, first, most, **shape.fold_constants(), num_warps=FOLD_WARPS)
    return out


def _shape(query: Tensor, context: AttentionContext, past: RowForm, entry: RowForm, selects: bool) -> Shape:
    entries = context.entries
    return Shape(
        mode=WINDOW if entries is None else SELECTED if selects else ALL,
        heads=query.shape[1],
        width=query.shape[2],
        window=context.window,
        ratio=context.ratio,
        block_rows=1 if entries is None else entries.rows_per_block,
        past=past,
        entry=entry,
        narrow=query.dtype is torch.bfloat16,
    )


def _longest(context: AttentionContext, selected: Tensor | None) -> int:
    """Entries in the longest list of a query."""
    if context.entries is None:
        return 0
    if selected is not None:
        return selected.shape[1]
    starts, offsets = context.queries.starts, context.queries.offsets
    return max((start + offsets[s + 1] - offsets[s]) // context.ratio for s, start in enumerate(starts))


def _lists(context: AttentionContext, selected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blocks and selected entries; where there are none, something that is not read."""
    blocks = context.past.slots if context.entries is None else context.entries.blocks
    return blocks, blocks if selected is None else selected.contiguous()


def _segments(context: AttentionContext) -> Iterator[Tensor]:
    queries, keys, past = context.queries, context.keys, context.past.offsets
    entries = past if context.entries is None else context.entries.offsets
    device = context.past.slots.device
    return (x.on(device) for x in (queries.offsets, queries.starts, keys.offsets, keys.starts, past, entries))


def _workspace(shape: Shape, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As large for a short context as for a long one: what a step takes does not grow with what came before."""
    return (
        like.new_empty(PARTS, shape.heads_at_once, shape.padded),
        like.new_empty(PARTS, 2, shape.heads_at_once),
        like.new_empty(PARTS, dtype=torch.int32),
    )


def launches(config: ModelConfig) -> list[Launch]:
    """Decoding and prefill run the same `attend`; `fold` is what decoding adds."""
    made = []
    width = config.head_dim
    for name, form, rows in (
        ("bfloat16", RowForm(PLAIN, width, 0), "*bf16"),
        ("fp8", RowForm(FP8_KV, packed_bytes(width, config.rope_dim), config.rope_dim), "*u8"),
    ):
        for mode, what, ratio in (
            (WINDOW, "window alone", 0),
            (SELECTED, "window and selected entries", config.csa_ratio),
            (ALL, "window and all entries", config.hca_ratio),
        ):
            block = config.unit_tokens // ratio if ratio else 1
            heads = config.num_attention_heads
            shape = Shape(mode, heads, width, config.window, ratio, block, form, form, True)
            constants, options = shape.attend_constants(), shape.options()
            what = f"{what}, {name} rows"
            made.append(Launch("attention", what, attend, _attend_types(rows), constants, options, matrix=True))
    types = _types(fold, {"sinks": "*fp32", "counts": "*i32"}, "*fp32")
    made.append(Launch("attention", "parts folded", fold, types, shape.fold_constants(), {"num_warps": FOLD_WARPS}))
    return made


def _attend_types(rows: str) -> dict[str, str]:
    ints = {name: "*i64" for name in ("past_slots", "blocks", "selected", *_OFFSETS)}
    return _types(
        attend,
        {"query": "*bf16", "new_rows": "*bf16", "past_rows": rows, "entry_rows": rows, "counts": "*i32", "scale": "fp32"}
        | ints,
        "*fp32",
    )


def _types(kernel: Any, known: dict[str, str], others: str) -> dict[str, str]:
    """Of all arguments that are no constexprs: what is not a pointer is named as none of them and an int32."""
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    return {name: known.get(name, others if name in _FLOATS else "i32") for name in names}
