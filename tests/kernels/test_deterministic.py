"""The deterministic backend: a row's bits depend neither on the rows beside it nor on its place among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention import HEADS, SCENES, Scene, random, sums
from thalweg.kernels.arguments import PagedRows, Segments
from thalweg.kernels.deterministic.linear import TILE, each_product, grouped_linear, linear, varying_shapes
from thalweg.kernels.deterministic.sums import folded, sigmoid, softplus
from thalweg.kernels.registry import deterministic_kernels, reference_kernels
from thalweg.kernels.spec import spec_of
from thalweg.model.rotary import angles

KERNELS, REFERENCE = deterministic_kernels(), reference_kernels()
WIDTHS = (1, 4, 8, 15, 24, 33, 48, 64, 96, 100, 128, 192, 512, 1000, 4096)
OUTPUTS = (1, 3, 4, 8, 24, 33, 64, 97, 128, 512, 1024)


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ANY_THREADS = pytest.mark.usefixtures("threads")


def rows_alone_equal(compute: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Rows computed alone, in smaller batches and in another order have the bits that they have in the whole batch."""
    total = len(inputs[0])
    whole = compute(*inputs)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(8))
    batches = [order, *(torch.arange(s, e) for s, e in ((0, 1), (total - 1, total), (1, 3), (2, 2 + TILE), (5, total)))]
    for rows in batches:
        part = compute(*(x[rows] for x in inputs))
        for a, b in zip(as_tuple(part), as_tuple(whole), strict=True):
            assert torch.equal(a, b[rows])


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@ANY_THREADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear(width: int, dtype: torch.dtype) -> None:
    for outputs in OUTPUTS:
        weight = random(outputs, width, seed=1).to(dtype)
        x = random(TILE + 9, width).to(dtype)
        ours = linear(x, weight)
        exact = x.double() @ weight.double().T
        if dtype is torch.float32:
            assert (ours.double() - exact).abs().max() <= spec_of("linear").tolerance * width**0.5
        else:
            assert torch.allclose(ours.double(), exact, rtol=0.02, atol=0.01 * width**0.5)
        for row, place in ((0, 0), (TILE, 5), (3, TILE - 1)):
            alone = linear(x[row : row + 1], weight)[0]
            assert torch.equal(alone, ours[row])
            other = torch.full((TILE, width), 3.0, dtype=dtype)
            other[place] = x[row]
            assert torch.equal(linear(other, weight)[place], ours[row])


def test_linear_takes_any_memory() -> None:
    """Views that begin anywhere and have gaps, no rows, more axes."""
    weight, wide = random(24, 40), random(50, 3, 41, seed=1)
    view = wide[7:, 1, 1:]
    assert torch.equal(linear(view, weight), linear(view.contiguous(), weight))
    assert linear(view[:0], weight).shape == (0, 24)
    assert torch.equal(linear(wide[..., :40], weight)[:, 2], linear(wide[:, 2, :40], weight))


def test_start_up_finds_shapes_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random(9, 24), random(4, 2, 7, 33), random(5), torch.zeros((3, 3), dtype=torch.int64)]
    assert varying_shapes(weights) == []
    monkeypatch.setattr(
        "thalweg.kernels.deterministic.linear.linear", lambda x, w: x @ w.T + torch.arange(len(x)).unsqueeze(1)
    )
    assert varying_shapes(weights) == [(9, 24), (7, 33)]


@ANY_THREADS
def test_grouped_linear() -> None:
    weight, x = random(3, 10, 16), random(70, 3, 16, seed=1)
    rows_alone_equal(lambda x: grouped_linear(x, weight), x)
    exact = torch.einsum("tgk,gnk->tgn", x.double(), weight.double())
    for kernels in (KERNELS, REFERENCE):
        assert (kernels.grouped_linear(x, weight).double() - exact).abs().max() <= spec_of("grouped_linear").tolerance


@ANY_THREADS
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (4, 64, 24), (6, 32, 512), (64, 512, 128)])
def test_products_of_one_query_each(m: int, k: int, n: int) -> None:
    rows_alone_equal(each_product, random(TILE + 9, m, k), random(TILE + 9, n, k, seed=1).transpose(1, 2))


@ANY_THREADS
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("hidden", [5, 48, 7168])
def test_hyper_connections(n: int, hidden: int) -> None:
    streams, y = random(75, n, hidden), random(75, hidden, seed=1)
    fn, base, scale = random((2 + n) * n, n * hidden, seed=2) / 9, random((2 + n) * n, seed=3), random(3, seed=4)
    rows_alone_equal(lambda s: KERNELS.mix_in(s, fn, base, scale, 1e-6, 1e-6, 20), streams)
    rows_alone_equal(lambda s: KERNELS.mix_head(s, fn[:n], base[:n], scale[:1], 1e-6, 1e-6), streams)
    _, post, comb = KERNELS.mix_in(streams, fn, base, scale, 1e-6, 1e-6, 20)
    rows_alone_equal(KERNELS.mix_out, y, streams, post, comb)


@ANY_THREADS
@pytest.mark.parametrize("width", [1, 5, 33, 128, 7168])
def test_functions_of_rows(width: int) -> None:
    x = random(801 if width < 999 else 75, width) * 4
    rows_alone_equal(lambda x: KERNELS.rms_norm(x, None, 1e-6), x)
    rows_alone_equal(lambda a, b: KERNELS.swiglu(a, b, 1.0), x, x.flip(0))
    rows_alone_equal(torch.exp, x)
    rows_alone_equal(sigmoid, x)
    rows_alone_equal(softplus, x)
    assert torch.allclose(sigmoid(x), torch.sigmoid(x), atol=1e-6)
    assert torch.allclose(softplus(x), torch.nn.functional.softplus(x), atol=1e-6)
    assert (KERNELS.swiglu(x, x, 2.0) - REFERENCE.swiglu(x, x, 2.0)).abs().max() <= spec_of("swiglu").tolerance


def test_far_values() -> None:
    x = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])
    assert sigmoid(x).tolist() == pytest.approx([0, 0, 0.5, 0.5, 1, 1], abs=1e-30)
    assert softplus(x)[[0, 1, 4, 5]].tolist() == pytest.approx([0, 0, 100, 1e4], abs=1e-30)
    assert KERNELS.swiglu(x, torch.ones(6), 10.0).isfinite().all()


@ANY_THREADS
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 130])
def test_folded(count: int) -> None:
    x = random(60, count, 7)
    rows_alone_equal(folded, x)
    assert torch.allclose(folded(x), x.sum(1), atol=1e-5)


@ANY_THREADS
def test_rotation_and_its_angles() -> None:
    positions = torch.arange(0, 1_000_000, 9973)
    frequencies = 10000.0 ** -(torch.arange(0, 10, 2) / 10)
    rows_alone_equal(lambda p: (angles(p, frequencies).cos, angles(p, frequencies).sin), positions)
    table = angles(positions, frequencies)
    rows_alone_equal(KERNELS.rotate, random(len(positions), 3, 17), table.cos, table.sin)


def test_roundings() -> None:
    rows_alone_equal(lambda x: KERNELS.round_kv(x, 8), random(80, 72))
    rows_alone_equal(KERNELS.round_index, random(80, 32))


@ANY_THREADS
@pytest.mark.parametrize(("tokens", "dim"), [(4, 8), (4, 16), (128, 48), (128, 512)])
def test_compress(tokens: int, dim: int) -> None:
    rows, before = random(300, 2 * dim), random(90, 2 * dim, seed=1)
    own = torch.randint(0, 300, (60, tokens), generator=torch.Generator().manual_seed(2))
    previous = torch.randint(-1, 90, (60, tokens), generator=torch.Generator().manual_seed(3))
    rows_alone_equal(lambda own: KERNELS.compress(rows, own), own)
    rows_alone_equal(lambda own, previous: KERNELS.compress(rows, own, before, previous), own, previous)


@ANY_THREADS
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("hidden", [24, 33])
def test_moe(hidden: int, hashed: bool) -> None:
    logits, bias = random(90, 6) * 3, random(6, seed=1)
    chosen = torch.randint(0, 6, (90, 2), generator=torch.Generator().manual_seed(2))
    if hashed:
        rows_alone_equal(lambda x, c: KERNELS.route(x, None, c, 2, 1.5), logits, chosen)
    else:
        rows_alone_equal(lambda x: KERNELS.route(x, bias, None, 2, 1.5), logits)
    ids, weights = KERNELS.route(logits, bias, chosen if hashed else None, 2, 1.5)
    up, down = random(6, 40, hidden, seed=3), random(6, hidden, 20, seed=4)
    rows_alone_equal(lambda x, i, w: KERNELS.experts(x, i, w, up, down, 1.0), random(90, hidden, seed=5), ids, weights)


def split_run(scene: Scene, chunks: list[int], mode: str) -> Tensor:
    """Attention and index_topk of one sequence, computed in chunks that start after what was there before."""
    start, end = scene.past[0], scene.ends[0]
    query, sinks = random(end - start, HEADS, scene.width, seed=6) * 2, random(HEADS, seed=5)
    weights = random(end - start, HEADS, seed=7)
    results = []
    done = start
    for count in chunks:
        part = Scene([done], [count], scene.ratio, scene.width)
        part.keys, part.paged = [scene.keys[0][: done + count]], scene.paged
        queries = Segments((0, count), (done,))
        q, w = query[done - start : done - start + count], weights[done - start : done - start + count]
        chosen = KERNELS.index_topk(q, w, scene.paged, queries, scene.ratio, 6)
        if mode == "index":
            results.append(chosen)
        else:
            selected = chosen if mode == "selected" else None
            context = part.context(queries, entries=mode != "window")
            results.append(KERNELS.attention(q, part.new_rows(), context, sinks, selected))
        done += count
    assert done == end
    return torch.cat(results)


@pytest.mark.parametrize("mode", ["index", "window", "selected", "all"])
@pytest.mark.parametrize(("past", "new", "ratio"), [(0, 150, 4), (33, 90, 4), (250, 140, 2), (2300, 37, 2)])
def test_chunks_do_not_matter(past: int, new: int, ratio: int, mode: str) -> None:
    scene = Scene([past], [new], ratio)
    whole = split_run(scene, [new], mode)
    assert not whole.isnan().any()
    for chunks in ([1] * 34 + [new - 34], [1, 30, 2, new - 33], [new - 1, 1]):
        assert torch.equal(split_run(scene, chunks, mode), whole)


@pytest.mark.parametrize("mode", ["window", "selected", "all"])
def test_sequences_do_not_matter(mode: str) -> None:
    scene = SCENES["ragged"]
    queries = Segments(sums(scene.new), tuple(scene.past))
    query, sinks = random(sum(scene.new), HEADS, scene.width, seed=6), random(HEADS, seed=5)
    chosen = KERNELS.index_topk(query, query[..., 0], scene.paged, queries, scene.ratio, 6)
    selected = chosen if mode == "selected" else None
    entries = mode != "window"
    together = KERNELS.attention(query, scene.new_rows(), scene.context(queries, entries=entries), sinks, selected)
    for s, count in enumerate(scene.new):
        alone = Scene([scene.past[s]], [count], scene.ratio)
        alone.keys = [scene.keys[s]]
        blocks = slice(scene.paged.offsets[s], scene.paged.offsets[s + 1])
        paged = PagedRows(scene.paged.rows, scene.paged.blocks[blocks], (0, blocks.stop - blocks.start), 4)
        alone.paged = paged
        own = Segments((0, count), (scene.past[s],))
        rows = slice(queries.offsets[s], queries.offsets[s + 1])
        picks = KERNELS.index_topk(query[rows], query[rows, :, 0], paged, own, scene.ratio, 6)
        assert torch.equal(picks, chosen[rows])
        context = alone.context(own, entries=entries)
        picked = picks if mode == "selected" else None
        assert torch.equal(KERNELS.attention(query[rows], alone.new_rows(), context, sinks, picked), together[rows])


def test_unwritten_rows_do_not_matter() -> None:
    """What lies in a pool beside a sequence's own entries, NaN too, changes nothing."""
    scene = Scene([250], [9], 4)
    results = []
    for filler in (0.0, float("nan")):
        used = torch.zeros(len(scene.paged.rows.data), dtype=torch.bool)
        numbers = torch.arange(scene.ends[0] // 4)
        used[scene.paged.blocks[numbers // 4] * 4 + numbers % 4] = True
        scene.paged.rows.data[~used] = filler
        results.append([split_run(scene, [9], mode) for mode in ("index", "selected", "all")])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
