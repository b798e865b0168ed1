"""Backends that promise bits: a row's result depends neither on the rows beside it nor on its place among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import COMPILED, Kernels, every_exact_backend, interpreted
from tests.kernels.test_attention import HEADS, SCENES, Scene, random, sums
from tests.kernels.threads import ANY_THREADS, threads
from thalweg.kernels.arguments import PagedRows, Segments
from thalweg.kernels.registry import reference_kernels
from thalweg.kernels.spec import spec_of
from thalweg.model.rotary import angles

__all__ = ["threads"]
REFERENCE = reference_kernels()


def rows_alone_equal(compute: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Rows computed alone, in smaller batches and in another order have the bits that they have in the whole batch."""
    total = len(inputs[0])
    whole = compute(*inputs)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(8))
    spans = ((0, 1), (total - 1, total), (1, 3), (2, min(34, total)), (5, total))
    batches = [order, *(torch.arange(begin, end) for begin, end in spans)]
    for rows in batches:
        part = compute(*(x[rows] for x in inputs))
        for a, b in zip(as_tuple(part), as_tuple(whole), strict=True):
            assert torch.equal(a, b[rows])


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("width", [1, 8, 33, 255, 256, 257, 4096])
@pytest.mark.parametrize("outputs", [1, 15, 24, 64, 97, 300])
def test_linear(kernels: Kernels, width: int, outputs: int, narrow: bool) -> None:
    """Also over weights that came in bfloat16, which some backends keep so: widening is exact."""
    if interpreted(kernels) and (narrow or width * outputs > 4000):
        pytest.skip("too long for the interpreter; test_quantised.py has bfloat16 and wider weights")
    weight, x = random(outputs, width, seed=1).bfloat16(), random(70 if interpreted(kernels) else 205, width)
    wide = kernels.pack(weight.float())
    keeps = not isinstance(kernels.pack, type(reference_kernels().pack))
    packed = kernels.pack(weight) if narrow and keeps else wide
    rows_alone_equal(lambda x: kernels.linear(x, packed), x)
    ours, exact = kernels.linear(x, packed), x.double() @ weight.double().T
    assert (ours.double() - exact).abs().max() <= spec_of("linear").tolerance * width**0.5
    assert torch.equal(ours, kernels.linear(x, wide))


@every_exact_backend()
@ANY_THREADS
def test_grouped_linear(kernels: Kernels) -> None:
    weight, x = random(3, 10, 16), random(70, 3, 16, seed=1)
    packed = kernels.pack(weight)
    rows_alone_equal(lambda x: kernels.grouped_linear(x, packed), x)
    exact = torch.einsum("tgk,gnk->tgn", x.double(), weight.double())
    assert (kernels.grouped_linear(x, packed).double() - exact).abs().max() <= spec_of("grouped_linear").tolerance


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("hidden", [5, 48, 7168])
def test_hyper_connections(kernels: Kernels, n: int, hidden: int) -> None:
    rows, hidden = (9, min(hidden, 300)) if interpreted(kernels) else (75, hidden)
    streams, y = random(rows, n, hidden), random(rows, hidden, seed=1)
    fn, base, scale = random((2 + n) * n, n * hidden, seed=2) / 9, random((2 + n) * n, seed=3), random(3, seed=4)
    packed, head = kernels.pack(fn), kernels.pack(fn[:n])
    rows_alone_equal(lambda s: kernels.mix_in(s, packed, base, scale, 1e-6, 1e-6, 20), streams)
    rows_alone_equal(lambda s: kernels.mix_head(s, head, base[:n], scale[:1], 1e-6, 1e-6), streams)
    _, post, comb = kernels.mix_in(streams, packed, base, scale, 1e-6, 1e-6, 20)
    rows_alone_equal(kernels.mix_out, y, streams, post, comb)


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize("n", [4, 7])
def test_hyper_connections_keep_to_their_token(kernels: Kernels, n: int) -> None:
    """Over a bfloat16 fn, where a backend keeps it so; and a token that is NaN spoils no other."""
    streams, fn = random(40, n, 160), (random((2 + n) * n, n * 160, seed=2) / 9).bfloat16()
    base, scale = random((2 + n) * n, seed=3), random(3, seed=4)
    keeps = not isinstance(kernels.pack, type(reference_kernels().pack))
    wide = kernels.pack(fn.float())
    packed = kernels.pack(fn) if keeps else wide
    rows_alone_equal(lambda s: kernels.mix_in(s, packed, base, scale, 1e-6, 1e-6, 20), streams)
    whole = kernels.mix_in(streams, wide, base, scale, 1e-6, 1e-6, 20)
    spoilt = streams.clone()
    spoilt[13] = torch.nan
    others = torch.arange(40) != 13
    for a, b in zip(kernels.mix_in(spoilt, packed, base, scale, 1e-6, 1e-6, 20), whole, strict=True):
        assert torch.equal(a[others], b[others]) and a[13].isnan().all()


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize("width", [1, 5, 33, 128, 7168])
def test_functions_of_rows(kernels: Kernels, width: int) -> None:
    x = random(801 if width < 999 and not interpreted(kernels) else 75, width) * 4
    rows_alone_equal(lambda x: kernels.rms_norm(x, None, 1e-6), x)
    rows_alone_equal(lambda x: kernels.rms_norm(x, x[0].bfloat16(), 1e-6), x[:1].expand(70, -1) * torch.ones(70, 1))
    rows_alone_equal(lambda a, b: kernels.swiglu(a, b, 1.0), x, x.flip(0))
    assert (kernels.swiglu(x, x, 2.0) - REFERENCE.swiglu(x, x, 2.0)).abs().max() <= spec_of("swiglu").tolerance


@every_exact_backend()
def test_far_values(kernels: Kernels) -> None:
    x = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])
    assert kernels.swiglu(x, torch.ones(6), 10.0).isfinite().all()


@every_exact_backend()
@ANY_THREADS
def test_rotation(kernels: Kernels) -> None:
    positions = torch.arange(0, 1_000_000, 9973)
    frequencies = 10000.0 ** -(torch.arange(0, 10, 2) / 10)
    table = angles(positions, frequencies)
    rows_alone_equal(
        lambda x, c, s: kernels.rotate(x.clone(), c, s), random(len(positions), 3, 17), table.cos, table.sin
    )


@every_exact_backend()
def test_roundings(kernels: Kernels) -> None:
    rows_alone_equal(lambda x: kernels.round_kv(x, 8), random(80, 72))
    rows_alone_equal(kernels.round_index, random(80, 32))


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize(("tokens", "dim"), [(4, 8), (4, 16), (128, 48), (128, 512)])
def test_compress(kernels: Kernels, tokens: int, dim: int) -> None:
    rows, before = random(300, 2 * dim), random(90, 2 * dim, seed=1)
    entries = 12 if interpreted(kernels) else 60
    own = torch.randint(0, 300, (entries, tokens), generator=torch.Generator().manual_seed(2))
    previous = torch.randint(-1, 90, (entries, tokens), generator=torch.Generator().manual_seed(3))
    rows_alone_equal(lambda own: kernels.compress(rows, own), own)
    rows_alone_equal(lambda own, previous: kernels.compress(rows, own, before, previous), own, previous)


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("hidden", [24, 33])
def test_moe(kernels: Kernels, hidden: int, hashed: bool) -> None:
    logits, bias = random(90, 6) * 3, random(6, seed=1)
    chosen = torch.randint(0, 6, (90, 2), generator=torch.Generator().manual_seed(2))
    if hashed:
        rows_alone_equal(lambda x, c: kernels.route(x, None, c, 2, 1.5), logits, chosen)
    else:
        rows_alone_equal(lambda x: kernels.route(x, bias, None, 2, 1.5), logits)
    ids, weights = kernels.route(logits, bias, chosen if hashed else None, 2, 1.5)
    up, down = (kernels.pack(w) for w in (random(6, 40, hidden, seed=3), random(6, hidden, 20, seed=4)))
    rows_alone_equal(lambda x, i, w: kernels.experts(x, i, w, up, down, 1.0), random(90, hidden, seed=5), ids, weights)


@every_exact_backend()
@ANY_THREADS
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("experts", [1, 3, 30])
def test_experts_of_many_rows(kernels: Kernels, experts: int, narrow: bool) -> None:
    """One row of an expert, a few, and more than a block; the same expert twice, too."""
    if interpreted(kernels) and narrow:
        pytest.skip("test_quantised.py has bfloat16 weights")
    tokens, hidden, inner = 20 if interpreted(kernels) else 230, 72, 40
    keeps = getattr(kernels.pack, "func", None) is not None
    up, down = random(experts, 2 * inner, hidden, seed=3), random(experts, hidden, inner, seed=4)
    packed = [kernels.pack(w.bfloat16() if narrow and keeps else w) for w in (up, down)]
    ids = torch.randint(0, experts, (tokens, 3), generator=torch.Generator().manual_seed(2))
    rows_alone_equal(
        lambda x, i, w: kernels.experts(x, i, w, *packed, 9.0), random(tokens, hidden), ids, random(tokens, 3, seed=1)
    )


@every_exact_backend()
@pytest.mark.parametrize("tokens", [1, 7, 400])
def test_threads_do_not_matter(kernels: Kernels, tokens: int) -> None:
    if interpreted(kernels):
        pytest.skip("the interpreter has one thread")
    up, down = kernels.pack(random(5, 256, 160, seed=3)), kernels.pack(random(5, 160, 128, seed=4))
    x, logits = random(tokens, 160), random(tokens, 300, seed=1)
    rows, own = random(4 * tokens, 600, seed=2), torch.arange(4 * tokens).view(tokens, 4)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        ids, weights = kernels.route(logits, None, None, 3, 1.5)
        experts = kernels.experts(x, ids % 5, weights, up, down, 9.0)
        results.append((weights, experts, kernels.swiglu(logits, logits, 2.0), kernels.compress(rows, own)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_exact_backend()
@pytest.mark.parametrize("tokens", [1, 4, 5, 13])
@pytest.mark.parametrize("dim", [1, 20, 300])
def test_absent_tokens_are_never_read(kernels: Kernels, tokens: int, dim: int) -> None:
    """Entries whose window before is not there at all, or in part; where it is, in float64."""
    rows, before = random(40, 2 * dim), random(40, 2 * dim, seed=1)
    own = torch.arange(3 * tokens).view(3, tokens)
    previous = own.clone()
    previous[0], previous[1, ::2] = -1, -1
    before[0], before[previous[1].max() + 1 : 2 * tokens] = float("nan"), float("nan")
    ours = kernels.compress(rows, own, before, previous)
    for entry in range(3):
        there = previous[entry][previous[entry] >= 0]
        value, gate = torch.cat([before[there], rows[own[entry]]]).double().chunk(2, -1)
        exact = (torch.softmax(gate, 0) * value).sum(0)
        assert (ours[entry].double() - exact).abs().max() <= spec_of("compress").tolerance
    assert kernels.compress(rows, own[:0], before, previous[:0]).shape == (0, dim)


def split_run(kernels: Kernels, scene: Scene, chunks: list[int], mode: str, heads: int = HEADS, k: int = 6) -> Tensor:
    """Attention and index_topk of one sequence, computed in chunks that start after what was there before."""
    start, end = scene.past[0], scene.ends[0]
    query, sinks = random(end - start, heads, scene.width, seed=6) * 2, random(heads, seed=5)
    weights = random(end - start, heads, seed=7)
    results = []
    done = start
    for count in chunks:
        part = Scene([done], [count], scene.ratio, scene.width, scene.window)
        part.keys, part.paged = [scene.keys[0][: done + count]], scene.paged
        queries = Segments((0, count), (done,))
        q, w = query[done - start : done - start + count], weights[done - start : done - start + count]
        chooses = mode in ("index", "selected")
        selected = kernels.index_topk(q, w, scene.paged, queries, scene.ratio, k) if chooses else None
        if mode == "index":
            results.append(selected)
        else:
            context = part.context(queries, entries=mode != "window")
            results.append(kernels.attention(q, part.new_rows(), context, sinks, selected))
        done += count
    assert done == end
    return torch.cat(results)


@every_exact_backend()
@pytest.mark.parametrize("mode", ["window", "selected", "all"])
def test_sequences_do_not_matter(kernels: Kernels, mode: str) -> None:
    scene = SCENES["ragged"]
    queries = Segments(sums(scene.new), tuple(scene.past))
    query, sinks = random(sum(scene.new), HEADS, scene.width, seed=6), random(HEADS, seed=5)
    chosen = kernels.index_topk(query, query[..., 0], scene.paged, queries, scene.ratio, 6)
    selected = chosen if mode == "selected" else None
    entries = mode != "window"
    together = kernels.attention(query, scene.new_rows(), scene.context(queries, entries=entries), sinks, selected)
    for s, count in enumerate(scene.new):
        alone = Scene([scene.past[s]], [count], scene.ratio)
        alone.keys = [scene.keys[s]]
        blocks = slice(scene.paged.offsets[s], scene.paged.offsets[s + 1])
        paged = PagedRows(scene.paged.rows, scene.paged.blocks[blocks], (0, blocks.stop - blocks.start), 4)
        alone.paged = paged
        own = Segments((0, count), (scene.past[s],))
        rows = slice(queries.offsets[s], queries.offsets[s + 1])
        picks = kernels.index_topk(query[rows], query[rows, :, 0], paged, own, scene.ratio, 6)
        assert torch.equal(picks, chosen[rows])
        context = alone.context(own, entries=entries)
        picked = picks if mode == "selected" else None
        assert torch.equal(kernels.attention(query[rows], alone.new_rows(), context, sinks, picked), together[rows])


@every_exact_backend()
@pytest.mark.parametrize("mode", ["index", "window", "selected", "all"])
@pytest.mark.parametrize(("past", "new", "ratio"), [(0, 150, 4), (33, 90, 4), (250, 140, 2), (2300, 37, 2)])
def test_chunks_do_not_matter(kernels: Kernels, past: int, new: int, ratio: int, mode: str) -> None:
    slow = interpreted(kernels)
    if slow and past not in (0, 2300):
        pytest.skip("the shortest and the longest say enough, a thousand times as slowly")
    past, new = (past + new - 12, 12) if slow else (past, new)
    scene = Scene([past], [new], ratio)
    whole = split_run(kernels, scene, [new], mode)
    assert not whole.isnan().any()
    many = [1] * 34 + [new - 34], [1, 30, 2, new - 33]
    for chunks in ([1, 7, 4], [11, 1]) if slow else (*many, [new - 1, 1]):
        assert torch.equal(split_run(kernels, scene, chunks, mode), whole)


@pytest.mark.parametrize("kernels", [make() for make in COMPILED.values()], ids=list(COMPILED))
@pytest.mark.parametrize("mode", ["window", "selected", "all"])
@pytest.mark.parametrize(
    ("heads", "width", "k", "past", "new", "ratio"),
    [(4, 64, 16, 9000, 40, 2), (8, 512, 512, 1250, 12, 1), (64, 512, 40, 300, 3, 4)],
)
def test_threads_and_chunks_do_not_matter_to_attention(
    kernels: Kernels, heads: int, width: int, k: int, past: int, new: int, ratio: int, mode: str
) -> None:
    """At shapes that are large enough for several threads even in a decode step."""
    scene, before, results = Scene([past], [new], ratio, width, 128), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results += [split_run(kernels, scene, chunks, mode, heads, k) for chunks in ([new], [1, new - 2, 1])]
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results) and not results[0].isnan().any()


@every_exact_backend()
def test_unwritten_rows_do_not_matter(kernels: Kernels) -> None:
    """What lies in a pool beside a sequence's own entries, NaN too, changes nothing."""
    scene = Scene([250], [9], 4)
    results = []
    for filler in (0.0, float("nan")):
        used = torch.zeros(len(scene.paged.rows.data), dtype=torch.bool)
        numbers = torch.arange(scene.ends[0] // 4)
        used[scene.paged.blocks[numbers // 4] * 4 + numbers % 4] = True
        scene.paged.rows.data[~used] = filler
        results.append([split_run(kernels, scene, [9], mode) for mode in ("index", "selected", "all")])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
