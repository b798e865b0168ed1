"""Small cases with edges, one list for all backends: single rows, no rows, odd widths, empty and unequal sequences."""

from __future__ import annotations

from collections.abc import Iterator

from thalweg.kernels.cases import caches, rows, stored
from thalweg.kernels.cases.caches import Heads, Span
from thalweg.kernels.cases.case import Case
from thalweg.kernels.cases.entries import INDEX_ROUNDINGS, KV_ROUNDINGS, insert_entries

LIMIT = 1.0  # of gated units: with inputs of deviation 4 it cuts many
ROWS = 45  # more than a tile of any backend's smallest, and no multiple of one

FIRST_TOKENS = (Span(0, 5), Span(0, 1))
WINDOW_EDGE = (Span(15, 3), Span(14, 2), Span(16, 1))
RAGGED = (Span(0, 6), Span(33, 1), Span(127, 2), Span(250, 1), Span(5, 4))
SOME_ASK = (Span(40, 6, 1), Span(9, 3, 0), Span(0, 4, 4), Span(130, 7, 1))
CHUNK = (Span(100, 40),)
MANY_ENTRIES = (Span(4200, 2),)


def check_cases() -> Iterator[Case]:
    """Every op at least once."""
    yield from _products()
    yield from _mixes()
    yield from _elements()
    yield from _experts()
    yield from _attention()
    yield from _index()
    yield from _stored()
    yield from _samples()
    yield from _entries()


def _products() -> Iterator[Case]:
    shapes = [(1, 64, 96), (ROWS, 1, 1), (ROWS, 33, 15), (ROWS, 257, 97), (7, 512, 64), (200, 300, 40)]
    for count, width, outputs in shapes:
        yield rows.linear(f"{count} x {width} x {outputs}", count, width, outputs)
    yield rows.linear(f"{ROWS} x 257 x 97, bfloat16 weights", ROWS, 257, 97, form="bfloat16")
    yield rows.linear("1 x 512 x 130, bfloat16 weights", 1, 512, 130, form="bfloat16")
    for form, count, width, outputs in (("fp8", ROWS, 257, 130), ("fp4", ROWS, 160, 70), ("fp4", 1, 640, 33)):
        yield rows.linear(f"{count} x {width} x {outputs}, {form} weights", count, width, outputs, form=form)
    yield rows.linear("long sums: 3 x 4096 x 33", 3, 4096, 33)
    for count, groups, width, outputs in ((1, 2, 64, 32), (ROWS, 3, 16, 10), (70, 2, 255, 65)):
        shape = f"{count} x {groups} x {width} x {outputs}"
        yield rows.grouped_linear(shape, count, groups, width, outputs)
    yield rows.grouped_linear("9 x 2 x 64 x 48, bfloat16 weights", 9, 2, 64, 48, form="bfloat16")
    yield rows.grouped_linear("9 x 2 x 130 x 128, fp8 weights", 9, 2, 130, 128, form="fp8")


def _mixes() -> Iterator[Case]:
    for count, streams, hidden in ((1, 4, 128), (ROWS, 4, 48), (ROWS, 3, 5), (5, 2, 1000)):
        shape = f"{count} x {streams} streams x {hidden}"
        yield rows.mix_in(shape, count, streams, hidden)
        yield rows.mix_out(shape, count, streams, hidden)
        yield rows.mix_head(shape, count, streams, hidden)
    yield rows.mix_in("one Sinkhorn round", 9, 4, 64, iterations=1)


def _elements() -> Iterator[Case]:
    for count, width in ((1, 128), (ROWS, 33), (ROWS, 512), (300, 5), (3, 7168)):
        yield rows.rms_norm(f"{count} x {width}", count, width)
        yield rows.swiglu(f"{count} x {width}", count, width, LIMIT)
    yield rows.rms_norm(f"{ROWS} x 64, no weight", ROWS, 64, weighted=False)
    for count, heads, width, rope in ((1, 4, 64, 16), (ROWS, 3, 17, 10), (ROWS, 1, 8, 8), (70, 2, 512, 64)):
        shape = f"{count} x {heads} x {width}, {rope} rotated"
        yield rows.rotate(shape, count, heads, width, rope)
        yield rows.norm_rotate(shape, count, heads, width, rope, weighted=heads == 1)
        yield rows.rotate_to(shape, count, heads, width, rope)
    for entries, tokens, width in ((1, 4, 64), (ROWS, 4, 8), (7, 128, 48), (20, 4, 33), (3, 3, 1)):
        for overlap in (False, True):
            shape = f"{entries} x {tokens} tokens x {width}{', overlapping' if overlap else ''}"
            yield rows.compress(shape, entries, tokens, width, overlap=overlap)
    for count, width, rope in ((1, 512, 64), (ROWS, 72, 8), (ROWS, 41, 10), (5, 194, 2)):
        yield rows.rounding("round_kv", f"{count} x {width}, {rope} rotated", count, width, rope)
    for count, width in ((1, 128), (ROWS, 64), (ROWS, 16), (5, 2)):
        yield rows.rounding("round_index", f"{count} x {width}", count, width)
    for count, width in ((1, 128), (ROWS, 64), (ROWS, 48), (5, 2), (9, 33)):
        yield rows.rounding("round_index_fp8", f"{count} x {width}", count, width)


def _experts() -> Iterator[Case]:
    for count, experts, k in ((1, 4, 2), (ROWS, 6, 2), (ROWS, 256, 6), (9, 5, 5), (3, 3, 1)):
        yield rows.route(f"{count} x {experts}, {k} of them", count, experts, k)
    for how in ("plain", "hashed", "equal"):
        yield rows.route(f"{ROWS} x 16, {how}", ROWS, 16, 3, how=how)
    for count, experts, k, hidden, inner in (
        (1, 4, 2, 128, 96),
        (ROWS, 6, 2, 33, 20),
        (90, 3, 1, 24, 50),
        (4, 16, 6, 64, 17),
    ):
        shape = f"{count} x {hidden}, {k} of {experts} x {inner}"
        yield rows.experts(shape, count, experts, k, hidden, inner, limit=LIMIT)
    for form, inner in (("bfloat16", 40), ("fp8", 64), ("fp4", 96)):
        yield rows.experts(f"5 x 64, 2 of 4 x {inner}, {form} weights", 5, 4, 2, 64, inner, limit=LIMIT, form=form)


def _attention() -> Iterator[Case]:
    small, odd, wide = Heads(3, 8, 2, 16, 4, 4), Heads(2, 41, 10, 16, 2, 3), Heads(4, 72, 8, 128, 4, 32)
    for name, spans in (
        ("first tokens", FIRST_TOKENS),
        ("at the window's edge", WINDOW_EDGE),
        ("sequences of all lengths", RAGGED),
        ("some without queries", SOME_ASK),
        ("a chunk", CHUNK),
    ):
        for mode in ("window", "selected", "all"):
            yield caches.attention(f"{name}, {mode}", spans, small, stored.WIDE, mode, 6)
    for mode in ("window", "selected", "all"):
        yield caches.attention(f"odd widths, {mode}", RAGGED, odd, stored.WIDE, mode, 5)
        for form in stored.KV_FORMATS:
            yield caches.attention(f"{form.name} rows, {mode}", RAGGED, wide, form, mode, 20)
    yield caches.attention("many entries, all", MANY_ENTRIES, Heads(2, 16, 4, 16, 2, 64), stored.WIDE, "all")
    yield caches.attention(
        "one query of V4's width, selected",
        (Span(900),),
        Heads(8, 512, 64, 128, 4, 32),
        stored.KV_FORMATS[-1],
        "selected",
        64,
    )


def _index() -> Iterator[Case]:
    small, wide = Heads(2, 8, 0, 0, 4, 4), Heads(3, 64, 0, 0, 4, 32)
    for name, spans in (
        ("first tokens", FIRST_TOKENS),
        ("sequences of all lengths", RAGGED),
        ("some without queries", SOME_ASK),
        ("a chunk", CHUNK),
    ):
        for k in (1, 6, 40):
            yield caches.index_topk(f"{name}, best {k}", spans, small, stored.WIDE, k)
    for form in stored.INDEX_FORMATS:
        yield caches.index_topk(f"{form.name} keys", RAGGED, wide, form, 9)
    yield caches.index_topk("odd widths", RAGGED, Heads(5, 34, 0, 0, 4, 3), stored.WIDE, 9)
    yield caches.index_topk("many entries", MANY_ENTRIES, Heads(2, 16, 0, 0, 2, 64), stored.WIDE, 33)
    yield caches.index_topk("one head", (Span(9000, 3),), Heads(1, 16, 0, 0, 2, 64), stored.WIDE, 500)


def _stored() -> Iterator[Case]:
    for form in stored.KV_FORMATS:
        for count, width, rope in ((1, 512, 64), (ROWS, 72, 8), (7, 41, 10)):
            yield stored.store_rows(f"{form.name} KV, {count} x {width}", form, count, width, rope)
            yield stored.read_rows(f"{form.name} KV, {count} x {width}", form, count, width, rope)
    for form in stored.INDEX_FORMATS[2:]:
        for count, width in ((1, 128), (ROWS, 48), (7, 2)):
            yield stored.store_rows(f"{form.name} keys, {count} x {width}", form, count, width)
            yield stored.read_rows(f"{form.name} keys, {count} x {width}", form, count, width)


def _samples() -> Iterator[Case]:
    for how in ("greedy", "plain", "truncated"):
        for count, vocab in ((1, 128), (ROWS, 33), (7, 9000)):
            yield rows.sample(f"{count} x {vocab}, {how}", count, vocab, how)
    yield rows.sample("3 x 1, truncated", 3, 1, "truncated")


def _entries() -> Iterator[Case]:
    for form, rounding in KV_ROUNDINGS:
        for count, tokens, width, rope, overlap in (
            (1, 4, 512, 64, True),
            (ROWS, 3, 41, 10, False),
            (5, 128, 72, 8, False),
        ):
            shape = f"{count} x {tokens} tokens x {width}, rounding {rounding}, {form.name} rows"
            yield insert_entries(shape, (form, rounding), count, tokens, width, rope, overlap=overlap)
    for form, rounding in INDEX_ROUNDINGS:
        for count, tokens, width, rope, overlap in (
            (1, 4, 128, 64, True),
            (ROWS, 4, 16, 4, True),
            (7, 2, 64, 2, False),
        ):
            shape = f"{count} x {tokens} tokens x {width}, rounding {rounding}, {form.name} keys"
            yield insert_entries(shape, (form, rounding), count, tokens, width, rope, overlap=overlap)
