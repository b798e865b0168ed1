"""Cases of attention and index_topk: batches of sequences whose rows lie scattered in paged pools.

A row of a result is one query. Asked for some of them, a case makes a batch of just those: neighbours of one sequence
stay together as a chunk of it, what came before them is read from the pools.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thalweg.kernels.arguments import AttentionContext, Ints, Packing, PagedRows, PastRows, Segments, StoredRows
from thalweg.kernels.cases.case import Bind, Bound, Call, Case, Source, Wide, cast
from thalweg.kernels.cases.stored import Format, fill
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.backend import reference_kernels

_POOL_ELEMENTS = 3 << 24  # of one pool, 192 MiB of fp32: beyond it blocks serve several times
_SPARE = 3  # slots or blocks of a pool that nobody owns
_INTEGERS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)  # what every index format holds exactly
_FP8_LARGEST = 7.0  # 448 / 64: with it in a row the scale of an FP8 key is a power of two


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a batch: `past` tokens are cached, `new` ones come in this step, the last `asked` ask."""

    past: int
    new: int = 1
    asked: int | None = None

    @property
    def queries(self) -> int:
        return self.new if self.asked is None else self.asked

    @property
    def end(self) -> int:
        return self.past + self.new


@dataclass(frozen=True, slots=True)
class Heads:
    """Shapes of one attention layer: H heads of `width`, `rope` of it rotated; entries stand for `ratio` tokens and lie
    in blocks of `block`."""

    count: int
    width: int
    rope: int
    window: int
    ratio: int
    block: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens first to last of sequence s, the last `queries` of them with queries: rows `row` onwards of the result."""

    s: int
    first: int
    last: int
    queries: int


@dataclass(frozen=True, slots=True)
class Entries:
    """A pool of compressed rows, and each sequence's blocks in it."""

    rows: StoredRows
    blocks: tuple[Tensor, ...]
    block: int

    def of(self, chunks: Iterable[Chunk]) -> PagedRows:
        own = [self.blocks[chunk.s] for chunk in chunks]
        return PagedRows(self.rows, torch.cat(own), Ints.offsets(len(blocks) for blocks in own), self.block)


@dataclass(frozen=True, slots=True)
class Windows:
    """Window rows of all sequences: the slot of each position from `origins` on; `values` by slot."""

    rows: StoredRows
    slots: tuple[Tensor, ...]
    origins: tuple[int, ...]
    values: Tensor = field(repr=False)

    def past(self, chunks: Iterable[Chunk], window: int) -> PastRows:
        own = [self._slots(c.s, max(self.origins[c.s], c.first - window + 1), c.first) for c in chunks]
        return PastRows(self.rows, torch.cat(own), Ints.offsets(len(slots) for slots in own))

    def new(self, chunks: Iterable[Chunk]) -> Tensor:
        return self.values[torch.cat([self._slots(c.s, c.first, c.last + 1) for c in chunks])]

    def _slots(self, s: int, first: int, end: int) -> Tensor:
        return self.slots[s][first - self.origins[s] : end - self.origins[s]]


def chunks_of(spans: tuple[Span, ...], chosen: Tensor | None) -> list[Chunk]:
    """The whole batch, or the chunks that the chosen queries make."""
    if chosen is None:
        return [Chunk(s, span.past, span.end - 1, span.queries) for s, span in enumerate(spans)]
    places = [(s, span.end - span.queries + i) for s, span in enumerate(spans) for i in range(span.queries)]
    chunks: list[Chunk] = []
    for s, position in (places[row] for row in chosen.tolist()):
        before = chunks[-1] if chunks else None
        if before is not None and (before.s, before.last + 1) == (s, position):
            chunks[-1] = Chunk(s, before.first, position, before.queries + 1)
        else:
            chunks.append(Chunk(s, position, position, 1))
    return chunks


def segments(chunks: list[Chunk]) -> Segments:
    """The rows with queries."""
    return Segments(Ints.offsets(c.queries for c in chunks), Ints(c.last + 1 - c.queries for c in chunks))


def _entries(source: Source, spans: tuple[Span, ...], heads: Heads, form: Format, *, whole: bool = False) -> Entries:
    """Blocks in no order, unwritten after the last entry. `whole`: numbers that every index format holds exactly."""
    counts = [span.end // heads.ratio for span in spans]
    needed = [-(-count // heads.block) for count in counts]
    room = min(sum(needed), _POOL_ELEMENTS // (heads.block * heads.width))
    order = source.order(room + _SPARE)
    blocks = order[torch.arange(sum(needed)) % max(1, room)].split(needed)
    if room == sum(needed):
        numbers = [torch.arange(count) for count in counts]
        places = zip(blocks, numbers, strict=True)
        used = torch.cat([own[n // heads.block] * heads.block + n % heads.block for own, n in places])
    else:
        used = (order[:room].unsqueeze(1) * heads.block + torch.arange(heads.block)).flatten()
    stored = form.empty((room + _SPARE) * heads.block, heads.width, heads.rope)
    fill(stored, used, _whole(source, len(used), heads.width, form) if whole else source.normal(len(used), heads.width))
    return Entries(stored, blocks, heads.block)


def _whole(source: Source, rows: int, width: int, form: Format) -> Tensor:
    values = torch.tensor([*(-value for value in _INTEGERS[:0:-1]), *_INTEGERS])
    keys = values[source.integers(0, len(values), rows, width)]
    if form.packing is Packing.FP8_INDEX:
        keys[:, 0] = _FP8_LARGEST
    return keys


def _windows(source: Source, spans: tuple[Span, ...], heads: Heads, form: Format) -> Windows:
    origins = tuple(max(0, span.past - heads.window + 1) for span in spans)
    counts = [span.end - origin for span, origin in zip(spans, origins, strict=True)]
    order = source.order(sum(counts) + _SPARE)
    used, stored = order[: sum(counts)], form.empty(len(order), heads.width, heads.rope)
    fill(stored, used, source.normal(len(used), heads.width))
    return Windows(stored, used.split(counts), origins, reference_kernels().read_rows(stored, torch.arange(len(order))))


def _selected(source: Source, spans: tuple[Span, ...], ratio: int, k: int) -> Tensor:
    """As index_topk gives them: int64 [Q, k], ascending, -1 first."""
    picked = []
    for t in (t for span in spans for t in range(span.end - span.queries, span.end)):
        seen = (t + 1) // ratio
        some = source.order(seen) if seen < 4 * k else source.integers(0, seen, 2 * k).unique()
        own = some[source.order(len(some))[:k]].sort().values
        picked.append(torch.cat([torch.full((k - len(own),), -1), own]))
    return torch.stack(picked)


def attention(shape: str, spans: tuple[Span, ...], heads: Heads, form: Format, mode: str, k: int = 0) -> Case:
    """`mode`: window, selected (k entries of each query) or all (every visible entry)."""
    total = sum(span.queries for span in spans)

    def inputs(source: Source) -> Bind:
        windows = _windows(source, spans, heads, form)
        entries = None if mode == "window" else _entries(source, spans, heads, form)
        query, sinks = source.normal(total, heads.count, heads.width) * 2, source.normal(heads.count)
        selected = _selected(source, spans, heads.ratio, k) if mode == "selected" else None

        def bind(kernels: Kernels, dtype: torch.dtype) -> Bound:
            def bound(chosen: Tensor | None) -> Call:
                chunks = chunks_of(spans, chosen)
                keys = Segments(Ints.offsets(c.last + 1 - c.first for c in chunks), Ints(c.first for c in chunks))
                past, own = windows.past(chunks, heads.window), None if entries is None else entries.of(chunks)
                context = AttentionContext(segments(chunks), keys, past, own, heads.ratio, heads.window)
                q = cast(query if chosen is None else query[chosen], dtype)
                picks = selected if selected is None or chosen is None else selected[chosen]
                given = (q, cast(windows.new(chunks), dtype), context, cast(Wide(sinks), dtype), picks)
                return lambda: kernels.attention(*given)

            return bound

        return bind

    return Case("attention", shape, _attention_sizes(spans, heads, form, mode, k), total, inputs)


def _attention_sizes(spans: tuple[Span, ...], heads: Heads, form: Format, mode: str, k: int) -> dict[str, int]:
    """Per query in the mean: a chunk's first query sees a little less than its last."""
    queries = max(1, sum(span.queries for span in spans))
    seen, distinct, window = 0, 0, 0
    for span in spans:
        positions = range(span.end - span.queries, span.end)
        visible = [(t + 1) // heads.ratio if mode != "window" else 0 for t in positions]
        taken = [min(k, count) for count in visible] if mode == "selected" else visible
        seen += sum(taken)
        window += sum(min(t + 1, heads.window) for t in positions)
        rows = min(span.end, heads.window + span.queries - 1) if span.queries else 0
        distinct += rows + min(sum(taken), max(visible, default=0))
    return {
        "queries": queries,
        "heads": heads.count,
        "width": heads.width,
        "window": round(window / queries),
        "entries": round(seen / queries),
        "distinct_rows": distinct,
        "element": 4,
        "row_bytes": form.row_bytes(heads.width, heads.rope),
    }


def index_topk(shape: str, spans: tuple[Span, ...], heads: Heads, form: Format, k: int, *, exact: bool = True) -> Case:
    """`exact`: whole numbers, so small that every order of sums gives the same scores and ties are ties."""
    total = sum(span.queries for span in spans)

    def inputs(source: Source) -> Bind:
        keys = _entries(source, spans, heads, form, whole=exact)
        query, weights = source.normal(total, heads.count, heads.width), source.normal(total, heads.count)
        if exact:
            query, weights = query.round().clamp(-2, 2), (weights * 2).round()

        def bind(kernels: Kernels, dtype: torch.dtype) -> Bound:
            def bound(chosen: Tensor | None) -> Call:
                chunks = chunks_of(spans, chosen)
                own = (cast(query, dtype), cast(Wide(weights), dtype))
                q, w = (x if chosen is None else x[chosen] for x in own)
                given = (q, w, keys.of(chunks), segments(chunks), heads.ratio, k)
                return lambda: kernels.index_topk(*given)

            return bound

        return bind

    visible = [[(t + 1) // heads.ratio for t in range(span.end - span.queries, span.end)] for span in spans]
    sizes = {
        "queries": max(1, total),
        "heads": heads.count,
        "width": heads.width,
        "entries": round(sum(sum(own) for own in visible) / max(1, total)),
        "distinct_rows": sum(max(own, default=0) for own in visible),
        "k": k,
        "element": 4,
        "row_bytes": form.row_bytes(heads.width, heads.rope),
    }
    return Case("index_topk", shape, sizes, total, inputs)
