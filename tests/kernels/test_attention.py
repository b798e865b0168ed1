"""attention, index_topk and compress against dense float64 twins written from model-spec 3.3 to 3.7."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.backends import Kernels, every_backend, interpreted
from tests.kernels.threads import ANY_THREADS, threads
from thalweg.kernels.arguments import AttentionContext, Packing, PagedRows, PastRows, Segments, StoredRows, plain_rows
from thalweg.kernels.spec import spec_of

__all__ = ["threads"]
HEADS, WIDTH, WINDOW, BLOCK = 3, 8, 16, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sums(counts: list[int]) -> tuple[int, ...]:
    return tuple(sum(counts[:i]) for i in range(len(counts) + 1))


@dataclass
class Scene:
    """Sequences with `past` and `new` tokens each; the entries of each lie in shuffled blocks."""

    past: list[int]
    new: list[int]
    ratio: int
    width: int = WIDTH
    window: int = WINDOW

    def __post_init__(self) -> None:
        self.ends = [p + n for p, n in zip(self.past, self.new, strict=True)]
        self.keys = [random(end, self.width, seed=i) for i, end in enumerate(self.ends)]
        self.entries = [random(max(1, end // self.ratio), self.width, seed=90 + i) for i, end in enumerate(self.ends)]
        blocks = [-(-len(e) // BLOCK) for e in self.entries]
        order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(9))[: sum(blocks)]
        self.paged = PagedRows(
            plain_rows(torch.zeros((sum(blocks) + 3) * BLOCK, self.width)), order, sums(blocks), BLOCK
        )
        for s, rows in enumerate(self.entries):
            for w in range(len(rows)):
                block = int(order[self.paged.offsets[s] + w // BLOCK])
                self.paged.rows.data[block * BLOCK + w % BLOCK] = rows[w]

    def context(self, queries: Segments, *, entries: bool) -> AttentionContext:
        seen = [min(p, self.window - 1) for p in self.past]
        old = torch.cat([k[p - n : p] for k, p, n in zip(self.keys, self.past, seen, strict=True)])
        slots = torch.randperm(len(old) + 5, generator=torch.Generator().manual_seed(4))[: len(old)]
        pool = torch.full((len(old) + 5, self.width), float("nan"))
        pool[slots] = old
        keys = Segments(sums(self.new), tuple(self.past))
        paged = self.paged if entries else None
        past = PastRows(plain_rows(pool), slots, sums(seen))
        return AttentionContext(queries, keys, past, paged, self.ratio, self.window)

    def new_rows(self) -> Tensor:
        return torch.cat([k[p:] for k, p in zip(self.keys, self.past, strict=True)])


def twin(scene: Scene, s: int, t: int, query: Tensor, sinks: Tensor, chosen: list[int] | None) -> Tensor:
    """One query of sequence s at position t, all heads, float64."""
    entries = list(range((t + 1) // scene.ratio)) if chosen is None else [w for w in chosen if w >= 0]
    rows = torch.cat([scene.keys[s][max(0, t - scene.window + 1) : t + 1], scene.entries[s][entries]]).double()
    logits = query.double() @ rows.T * scene.width**-0.5
    weights = torch.exp(logits)
    return (weights @ rows) / (weights.sum(-1, keepdim=True) + torch.exp(sinks.double())[:, None])


SCENES = {
    "first tokens": Scene([0], [5], 4),
    "window edge": Scene([15], [3], 4),
    "chunk over several tiles": Scene([100], [300], 128),
    "ragged": Scene([0, 33, 127, 250], [17, 1, 2, 1], 4),
    "many entries": Scene([2300], [2], 2),
}


@every_backend()
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("mode", ["window", "all entries", "selected", "last row only"])
def test_attention(kernels: Kernels, name: str, mode: str) -> None:
    scene = SCENES[name]
    sinks = random(HEADS, seed=5)
    only = mode == "last row only"
    counts = [1] * len(scene.new) if only else scene.new
    starts = tuple(e - c for e, c in zip(scene.ends, counts, strict=True))
    queries = Segments(sums(counts), starts)
    query = random(sum(counts), HEADS, scene.width, seed=6) * 2
    selected = None
    if mode in ("selected", "last row only"):
        picks = []
        for start, count in zip(starts, counts, strict=True):
            for t in range(start, start + count):
                seen = (t + 1) // scene.ratio
                order = torch.randperm(seen, generator=torch.Generator().manual_seed(t))[:6].tolist()
                picks.append(order + [-1] * (6 - len(order)))
        selected = torch.tensor(picks)
    context = scene.context(queries, entries=mode != "window")
    ours = kernels.attention(query, scene.new_rows(), context, sinks, selected)
    row = 0
    for s, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for t in range(start, start + count):
            chosen = [] if mode == "window" else None if selected is None else selected[row].tolist()
            expected = twin(scene, s, t, query[row], sinks, chosen)
            assert (ours[row].double() - expected).abs().max() <= spec_of("attention").tolerance
            row += 1


SERVED = {  # heads, selected entries, scene; windows of several tiles of keys
    "small": (4, 16, Scene([700, 0, 127, 2500], [70, 5, 1, 1], 4, 64, 128)),
    "race": (8, 512, Scene([2100, 0], [3, 70], 4, 512, 128)),
    "flash": (64, 40, Scene([300], [2], 4, 512, 128)),
    "odd": (5, 70, Scene([600, 3], [9, 40], 1, 84, 77)),
    "very many heads": (70, 9, Scene([130], [3], 4, 24, 128)),
}


@every_backend()
@ANY_THREADS
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("mode", ["window", "all entries", "selected"])
def test_attention_at_served_shapes(kernels: Kernels, name: str, mode: str) -> None:
    heads, k, scene = SERVED[name]
    sinks, query = random(heads, seed=5), random(sum(scene.new), heads, scene.width, seed=6)
    queries = Segments(sums(scene.new), tuple(scene.past))
    positions = [(s, t) for s, past in enumerate(scene.past) for t in range(past, scene.ends[s])]
    order = torch.Generator().manual_seed(1)
    picks = [torch.randperm((t + 1) // scene.ratio, generator=order)[:k].sort().values.tolist() for _, t in positions]
    selected = torch.tensor([[-1] * (k - len(row)) + row for row in picks]) if mode == "selected" else None
    context = scene.context(queries, entries=mode != "window")
    ours = kernels.attention(query, scene.new_rows(), context, sinks, selected)
    for row, (s, t) in enumerate(positions):
        chosen = {"window": [], "all entries": None, "selected": picks[row]}[mode]
        expected = twin(scene, s, t, query[row], sinks, chosen)
        assert (ours[row].double() - expected).abs().max() <= spec_of("attention").tolerance


def topk_twin(scores: list[float], k: int) -> list[int]:
    """The k best; among equals the lowest entry; ascending, -1 first."""
    best = sorted(range(len(scores)), key=lambda w: (-scores[w], w))[:k]
    return [-1] * (k - len(best)) + sorted(best)


@every_backend()
@pytest.mark.parametrize("k", [1, 6, 40])
@pytest.mark.parametrize("case", ["random", "ties", "all zero", "signed zeros", "negative"])
@pytest.mark.parametrize("name", SCENES)
def test_index_topk(kernels: Kernels, name: str, case: str, k: int) -> None:
    """Values are small integers, so that scores are exact in fp32 and ties are ties."""
    scene = SCENES[name]
    high = {"random": 5, "ties": 2}.get(case, 3)
    data = scene.paged.rows.data
    data[:] = torch.randint(-high, high + 1, data.shape, generator=torch.Generator().manual_seed(3)).float()
    total = sum(scene.new)
    query = torch.randint(-2, 3, (total, 2, scene.width), generator=torch.Generator().manual_seed(1)).float()
    weights = torch.randint(-3, 4, (total, 2), generator=torch.Generator().manual_seed(2)).float()
    if case == "all zero":
        query.zero_()
    if case == "signed zeros":
        query[:, 0], weights[:, 0], weights[:, 1] = 0, -1.0, 0.0
    if case == "negative":
        weights = -weights.abs() - 1
    queries = Segments(sums(scene.new), tuple(scene.past))
    ours = kernels.index_topk(query, weights, scene.paged, queries, scene.ratio, k)
    row = 0
    for s, (start, count) in enumerate(zip(scene.past, scene.new, strict=True)):
        for t in range(start, start + count):
            if row % 5 == 0 or count < 20:
                seen = (t + 1) // scene.ratio
                numbers = torch.arange(seen)
                blocks = scene.paged.blocks[scene.paged.offsets[s] : scene.paged.offsets[s + 1]]
                rows = data[blocks[numbers // BLOCK] * BLOCK + numbers % BLOCK]
                scores = (torch.relu(query[row] @ rows.T) * weights[row][:, None]).sum(0)
                assert ours[row].tolist() == topk_twin(scores.tolist(), k)
            row += 1


def test_the_many_entries_scene_needs_more_than_one_tile() -> None:
    from thalweg.kernels.reference.attention import ENTRY_TILE

    scene = SCENES["many entries"]
    assert scene.ends[0] // scene.ratio > ENTRY_TILE


@every_backend()
@pytest.mark.parametrize("overlap", [False, True])
def test_compress(kernels: Kernels, overlap: bool) -> None:
    dim, m = 6, 4
    rows, before = random(20, 2 * dim), random(9, 2 * dim, seed=1)
    own = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4], [16, 17, 18, 19]])
    previous = torch.tensor([[-1, -1, -1, -1], [0, 1, 2, 3], [5, 6, 7, 8]])
    ours = kernels.compress(rows, own, before, previous) if overlap else kernels.compress(rows, own)
    assert ours.shape == (3, dim)
    for e in range(3):
        slots = [rows[i].double() for i in own[e]]
        if overlap:
            slots += [before[i].double() for i in previous[e] if i >= 0]
        for channel in range(dim):
            values = torch.stack([slot[channel] for slot in slots])
            gates = torch.stack([slot[dim + channel] for slot in slots])
            expected = (torch.softmax(gates, 0) * values).sum()
            assert abs(float(ours[e, channel]) - float(expected)) <= spec_of("compress").tolerance
    assert m == own.shape[1]


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and not any(value is a for a in args):
                storage = value.untyped_storage().data_ptr()
                if not any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() == storage for a in args):
                    self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


PACKED = [
    (StoredRows(torch.empty(0, 16, dtype=torch.uint8), Packing.FP8_KV, WIDTH, 2), "attention"),
    (StoredRows(torch.empty(0, 12, dtype=torch.uint8), Packing.FP8_INDEX, WIDTH), "index_topk"),
    (StoredRows(torch.empty(0, 5, dtype=torch.uint8), Packing.FP4_INDEX, WIDTH), "index_topk"),
]


def packed(kernels: Kernels, form: StoredRows, rows: Tensor) -> tuple[StoredRows, StoredRows]:
    """Rows in a packed format, NaN where `rows` are, and plain rows of the values that it holds."""
    unwritten = float("nan") if form.packing is Packing.PLAIN else 255
    data = torch.full((len(rows), form.data.shape[1]), unwritten, dtype=form.data.dtype)
    stored = dataclasses.replace(form, data=data)
    written = (~rows.isnan().any(-1)).nonzero().flatten()
    kernels.store_rows(stored, written, rows[written])
    return stored, plain_rows(kernels.read_rows(stored, torch.arange(len(rows))))


@every_backend()
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize(("form", "op"), PACKED)
def test_packed_rows_give_what_their_values_give(kernels: Kernels, name: str, form: StoredRows, op: str) -> None:
    """The same bits from bytes as from fp32 rows of the same values."""
    if interpreted(kernels) and name == "chunk over several tiles":
        pytest.skip("300 queries, a thousand times as slowly")
    scene = SCENES[name]
    queries = Segments(sums(scene.new), tuple(scene.past))
    total, results = sum(scene.new), []
    query = random(total, HEADS, scene.width, seed=6)
    both = packed(kernels, form, random(*scene.paged.rows.data.shape, seed=8))
    context = scene.context(queries, entries=True)
    pasts = packed(kernels, form, context.past.rows.data)
    for entries, past in zip(both, pasts, strict=True):
        paged = dataclasses.replace(scene.paged, rows=entries)
        if op == "attention":
            seen = dataclasses.replace(context, past=dataclasses.replace(context.past, rows=past), entries=paged)
            results.append(kernels.attention(query, scene.new_rows(), seen, random(HEADS), None))
            chosen = kernels.index_topk(query, random(total, HEADS), paged, queries, scene.ratio, 5)
            results[-1] += kernels.attention(query, scene.new_rows(), seen, random(HEADS), chosen)
        else:
            results.append(kernels.index_topk(query, random(total, HEADS), paged, queries, scene.ratio, 5))
    assert torch.equal(*results) and not results[0].isnan().any()


KV_FORMS = [
    StoredRows(torch.empty(0, WIDTH, dtype=torch.bfloat16), Packing.PLAIN, WIDTH),
    StoredRows(torch.empty(0, 33, dtype=torch.bfloat16), Packing.PLAIN, 33),
    StoredRows(torch.empty(0, 512, dtype=torch.bfloat16), Packing.PLAIN, 512),
    StoredRows(torch.empty(0, 88, dtype=torch.uint8), Packing.FP8_KV, 64, 16),
    StoredRows(torch.empty(0, 88, dtype=torch.uint8), Packing.FP8_KV, 75, 6),
    StoredRows(torch.empty(0, 584, dtype=torch.uint8), Packing.FP8_KV, 512, 64),
]


@every_backend()
@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("form", KV_FORMS, ids=lambda form: f"{form.packing.value}-{form.width}")
def test_kv_formats_at_many_widths(kernels: Kernels, form: StoredRows, selects: bool) -> None:
    """The same bits from a cache in any format, some of it unwritten, as from fp32 rows of the same values. Magnitudes
    go from subnormal codes to large ones."""
    scene = Scene([0, 133, 2300], [4 if interpreted(kernels) else 40, 1, 2], 2, form.width)
    queries = Segments(sums(scene.new), tuple(scene.past))
    query = random(sum(scene.new), HEADS, form.width, seed=6) / 4
    spread = torch.exp2(random(form.width, seed=7) * 3)
    context = scene.context(queries, entries=True)
    own = scene.paged.rows.data * spread
    own[(own == 0).all(-1)] = float("nan")
    entries, past = packed(kernels, form, own), packed(kernels, form, context.past.rows.data * spread)
    selected = None
    if selects:
        visible = (torch.cat([torch.arange(p, e) + 1 for p, e in zip(scene.past, scene.ends, strict=True)]) // 2)[
            :, None
        ]
        selected = (random(len(visible), 70, seed=9).abs() * visible / 3).long()
        selected = torch.where(selected < visible, selected, -1)
    results = []
    for rows, old in zip(entries, past, strict=True):
        paged = dataclasses.replace(scene.paged, rows=rows)
        seen = dataclasses.replace(context, past=dataclasses.replace(context.past, rows=old), entries=paged)
        results.append(kernels.attention(query, scene.new_rows(), seen, random(HEADS), selected))
    assert torch.equal(*results) and not results[0].isnan().any()


@every_backend()
@pytest.mark.parametrize(("form", "op"), [(None, ""), *PACKED])
def test_workspace_does_not_grow_with_the_context(kernels: Kernels, form: StoredRows | None, op: str) -> None:
    """The largest temporary at 16 times the context is the same, for both ops that read the whole history."""
    peaks, count = [], 4 if interpreted(kernels) else 64
    for context in (16384, 65536) if interpreted(kernels) else (32768, 524288):
        blocks = torch.arange(context // 4 // BLOCK)
        slots = len(blocks) * BLOCK
        rows = plain_rows(random(slots, WIDTH))
        if form is not None:
            rows = dataclasses.replace(form, data=torch.zeros(slots, form.data.shape[1], dtype=torch.uint8))
        paged = PagedRows(rows, blocks, (0, len(blocks)), BLOCK)
        queries = Segments((0, count), (context - count,))
        past = PastRows(plain_rows(random(WINDOW, WIDTH)), torch.arange(WINDOW - 1), (0, WINDOW - 1))
        everything = AttentionContext(queries, queries, past, paged, 4, WINDOW)
        with LargestTensor() as largest:
            if form is None or op == "attention":
                kernels.attention(random(count, HEADS, WIDTH), random(count, WIDTH), everything, random(HEADS), None)
            if form is None or op != "attention":
                kernels.index_topk(random(count, 2, WIDTH), random(count, 2), paged, queries, 4, 512)
        peaks.append(largest.bytes)
    assert peaks[0] == peaks[1] > 0
