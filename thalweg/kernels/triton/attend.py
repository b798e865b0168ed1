"""The kernels of attention: `attend` takes in the chunks of a query, `fold` joins those that it left in the workspace.

attention.py says how they work together and why a row's bits do not depend on its company.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from thalweg.kernels.triton.stored import load_rows, over_rows

WINDOW, SELECTED, ALL = 0, 1, 2
LOG2_E = 1.4426950408889634
_WINDOW, _ALL = tl.constexpr(WINDOW), tl.constexpr(ALL)
_FLOOR = tl.constexpr(-1e30)  # a maximum over nothing: unlike -inf its difference from itself is 0
_LOG2_E = tl.constexpr(LOG2_E)
_AT_ONCE = tl.constexpr(256)


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
def _folded(maximum, denominator, m, z, last):
    """Maximum and denominator with those of one more chunk, and the factors of the old total and of the chunk; with
    the last one the total becomes the result."""
    top = tl.maximum(maximum, m)
    old, new = tl.exp2(maximum - top), tl.exp2(m - top)
    denominator = tl.fma(denominator, old, z * new)
    share = tl.where(last, 1.0 / denominator, 1.0)
    return top, denominator, old * share, new * share


@triton.jit
def _taken_in(q, rows, seen, scale, always, m, z, acc):
    """The softmax of a chunk with one more tile of rows [T, d]."""
    s = tl.dot(q, tl.trans(rows), input_precision="ieee")
    p, faded = s, m  # no zeros, which would stay in registers all along
    # A condition that is always met, and that the compiler cannot see through: without it Triton takes the two products
    # for a chain, gives each warp whole rows of s, and both warpgroups of Hopper compute all of it (68 HGMMA for 132).
    if always:
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(tl.fma(s, scale, -top[:, None]))
        faded = tl.exp2(m - top)
        m = top
        z = tl.fma(z, faded, tl.sum(p, 1))
    acc = tl.dot(p.to(rows.dtype), rows, acc * faded[:, None], input_precision="ieee")
    return m, z, acc


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
def _offsets(QUARTER: tl.constexpr, HEADS_AT_ONCE: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr):
    """[H / 8, 8, 2, d / 8] int32: places of a quarter's values, their heads and their columns.

    Heads are two numbers because a thread then has one address and adds constants to it, not one for each of its heads.
    """
    START: tl.constexpr = (QUARTER // 2) * (PADDED // 4) + (QUARTER % 2) * (PADDED // 8)
    head = (tl.arange(0, HEADS_AT_ONCE // 8) * 8)[:, None, None, None] + tl.arange(0, 8)[None, :, None, None]
    half, column = tl.arange(0, 2)[None, None, :, None], tl.arange(0, PADDED // 8)[None, None, None, :]
    column = half * (PADDED // 2) + START + column
    return head * STRIDE + column, head, column


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
    HEADS_AT_ONCE: tl.constexpr = acc.shape[0]
    place, head, column = _offsets(QUARTER, HEADS_AT_ONCE, WIDTH, PADDED)
    at += place
    acc = tl.reshape(acc, [HEADS_AT_ONCE // 8, 8, 2, PADDED // 8])
    old_factor = tl.reshape(old_factor, [HEADS_AT_ONCE // 8, 8, 1, 1])
    factor = tl.reshape(factor, [HEADS_AT_ONCE // 8, 8, 1, 1])
    if EVEN:
        total = tl.load(at, mask=again, other=0.0)
        tl.store(at, tl.fma(total, old_factor, acc * factor))
    else:
        kept = (head < heads) & (column < WIDTH)
        total = tl.load(at, mask=kept & again, other=0.0)
        tl.store(at, tl.fma(total, old_factor, acc * factor), mask=kept)


@triton.jit
def _put(at, acc, QUARTER: tl.constexpr, PADDED: tl.constexpr):
    """A quarter of a chunk's sum into the workspace."""
    HEADS_AT_ONCE: tl.constexpr = acc.shape[0]
    place, _, _ = _offsets(QUARTER, HEADS_AT_ONCE, PADDED, PADDED)
    tl.store(at + place, tl.reshape(acc, [HEADS_AT_ONCE // 8, 8, 2, PADDED // 8]))


@triton.jit
def _set(at, acc, QUARTER: tl.constexpr, factor, heads, EVEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A quarter of the only chunk. Heads are one number: as two, without a total to read, Blackwell's build spills."""
    START: tl.constexpr = (QUARTER // 2) * (PADDED // 4) + (QUARTER % 2) * (PADDED // 8)
    head = tl.arange(0, acc.shape[0])[:, None, None]
    column = tl.arange(0, 2)[None, :, None] * (PADDED // 2) + START + tl.arange(0, PADDED // 8)[None, None, :]
    acc *= factor[:, None, None]
    if EVEN:
        tl.store(at + (head * WIDTH + column), acc)
    else:
        tl.store(at + (head * WIDTH + column), acc, mask=(head < heads) & (column < WIDTH))


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
    z,
    acc,
    ALONE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A chunk done: fold it into the total, or leave it in the workspace. Returns maximum and denominator so far."""
    HEADS_AT_ONCE: tl.constexpr = acc.shape[0]
    a, b, c, d = _quarters(acc, HEADS_AT_ONCE, PADDED)
    if ALONE:
        maximum, denominator, old, new = _folded(maximum, denominator, m, z, True)
        _set(row_at, a, 0, new, heads, EVEN, WIDTH, PADDED)
        _set(row_at, b, 1, new, heads, EVEN, WIDTH, PADDED)
        _set(row_at, c, 2, new, heads, EVEN, WIDTH, PADDED)
        _set(row_at, d, 3, new, heads, EVEN, WIDTH, PADDED)
    elif tl.num_programs(1) == 1:
        maximum, denominator, old, new = _folded(maximum, denominator, m, z, chunk + 1 == count)
        again = chunk > 0
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
        tl.store(summaries + (part * 2 + 1) * HEADS_AT_ONCE + inner, z)
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
        z = tl.zeros([HEADS_AT_ONCE], tl.float32)
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
                m, z, acc = _taken_in(q, rows, new | old, scale, run > 0, m, z, acc)
        elif MODE != _WINDOW:
            begin = (chunk - 1) * CHUNK
            own_blocks = blocks + tl.load(entry_offsets + s)
            for start in tl.range(begin, tl.minimum(begin + CHUNK, entries), TILE, disable_licm=True):
                if MODE == _ALL:
                    entry = start + lane
                    seen = entry < entries
                else:
                    own = selected + row.to(tl.int64) * chosen + start
                    entry = tl.load(own + lane, mask=lane < entries - start, other=-1).to(tl.int32)
                    seen = entry >= 0
                block = tl.load(own_blocks + entry // BLOCK_ROWS, mask=seen, other=0)
                slots = block * BLOCK_ROWS + entry % BLOCK_ROWS
                rows = load_rows(
                    entry_rows, entry_shift, slots, seen, ENTRY_FORM, ENTRY_STRIDE, ENTRY_ROPE, WIDTH, PADDED, q.dtype
                )
                m, z, acc = _taken_in(q, rows, seen, scale, run > 0, m, z, acc)
        maximum, denominator = _finished(
            out + row_at, parts, summaries, part + chunk, chunk, count, heads, maximum, denominator, m, z, acc,
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
        z = tl.load(summaries + (part * 2 + 1) * HEADS_AT_ONCE + inner)
        acc = tl.load(parts + (part.to(tl.int64) * HEADS_AT_ONCE + inner) * PADDED + column)
        maximum, denominator, old_factor, factor = _folded(maximum, denominator, m, z, chunk + 1 == count)
        total = tl.fma(total, old_factor, acc * factor)
    row = (first_query + tl.program_id(0)).to(tl.int64)
    tl.store(out + (row * HEADS + head) * WIDTH + column, total, mask=column < WIDTH)
