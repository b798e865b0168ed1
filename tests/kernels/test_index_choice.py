"""Triton's index_topk where its own structure could show: parts, workspace, groups, formats in bfloat16, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.errors import ConfigError
from thalweg.kernels.arguments import Packing, PagedRows, Segments, StoredRows, plain_rows
from thalweg.kernels.cases.stored import INDEX_FORMATS, Format, fill
from thalweg.kernels.registry import reference_kernels

pytest.importorskip("triton")

from thalweg.kernels.triton import indexer
from thalweg.kernels.triton.backend import triton_kernels

BLOCK = 32
KERNELS, REFERENCE = triton_kernels(), reference_kernels()
NAN, INFINITE = float("nan"), float("inf")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, high: int = 2, seed: int = 0) -> Tensor:
    """Small whole numbers: every sum of them is exact, and many scores are equal."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def paged(rows: StoredRows, counts: list[int]) -> PagedRows:
    """Shuffled blocks of the entries of several sequences; rows past the last entry are unwritten."""
    blocks = [-(-count // BLOCK) for count in counts]
    order = torch.randperm(len(rows.data) // BLOCK, generator=torch.Generator().manual_seed(5))[: sum(blocks)]
    return PagedRows(rows, order, (0, *torch.tensor(blocks).cumsum(0).tolist()), BLOCK)


def scene(keys: Tensor, ends: list[int], new: list[int]) -> tuple[PagedRows, Segments]:
    """Sequences of `ends` tokens, one entry for each, that all begin with `keys`; the last `new` tokens ask."""
    pool = paged(plain_rows(torch.full((len(ends) * (len(keys) + 2 * BLOCK), keys.shape[1]), NAN)), ends)
    for s, end in enumerate(ends):
        entries = torch.arange(end)
        own = pool.blocks[pool.offsets[s] : pool.offsets[s + 1]]
        pool.rows.data[own[entries // BLOCK] * BLOCK + entries % BLOCK] = keys[:end]
    starts = tuple(end - count for end, count in zip(ends, new, strict=True))
    return pool, Segments((0, *torch.tensor(new).cumsum(0).tolist()), starts)


@pytest.mark.parametrize("high", [1, 6])
@pytest.mark.parametrize("k", [1, 5, 32])
def test_parts_and_workspace_do_not_matter(monkeypatch: pytest.MonkeyPatch, k: int, high: int) -> None:
    """Parts so small that a choice takes up to four levels, and a workspace of few rows of scores."""
    monkeypatch.setattr(indexer, "SMALL", 32)
    monkeypatch.setattr(indexer, "PART", 64)
    monkeypatch.setattr(indexer, "SCORES", 3000)
    keys, queries = scene(whole(700, 8, high=high), [700, 3, 64, 129], [4, 3, 1, 2])
    query, weights = whole(10, 2, 8, seed=1), whole(10, 2, seed=2)
    ours = KERNELS.index_topk(query, weights, keys, queries, 1, k)
    assert torch.equal(ours, REFERENCE.index_topk(query, weights, keys, queries, 1, k))


def test_the_largest_part_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (indexer.SMALL, indexer.SMALL + 1, indexer.PART, indexer.PART + 1):
        keys, queries = scene(whole(end, 4, high=9), [end], [1])
        query, weights = whole(1, 2, 4, seed=1), whole(1, 2, seed=2)
        ours = KERNELS.index_topk(query, weights, keys, queries, 1, indexer.SMALL // 2)
        assert torch.equal(ours, REFERENCE.index_topk(query, weights, keys, queries, 1, indexer.SMALL // 2))


def test_more_than_a_part_can_leave_is_an_error() -> None:
    keys, queries = scene(whole(9, 4), [9], [1])
    with pytest.raises(ConfigError, match="index_topk is 4097: the Triton kernels choose 4096 entries at most"):
        KERNELS.index_topk(whole(1, 2, 4), whole(1, 2), keys, queries, 1, 4097)


def test_nan_is_the_best_and_infinity_next() -> None:
    """As in the reference, also where heads and widths are padded."""
    rows = whole(60, 5, seed=3)
    rows[[7, 40]] = NAN
    rows[20, 0] = INFINITE
    query, weights = whole(3, 3, 5, seed=1).abs() + 1, torch.ones(3, 3)
    keys, queries = scene(rows, [60], [3])
    for k, best in ((1, [7]), (2, [7, 40]), (3, [7, 20, 40])):
        ours = KERNELS.index_topk(query, weights, keys, queries, 1, k)
        assert ours.tolist() == [best] * 3
        assert torch.equal(ours, REFERENCE.index_topk(query, weights, keys, queries, 1, k))


def scores_of(step: indexer.Rows, rows: int, most: int) -> Tensor:
    scores = torch.full((rows, most), NAN)
    step.score(scores, most, 0, rows, most)
    return scores


@pytest.mark.parametrize("form", INDEX_FORMATS, ids=lambda form: form.name)
def test_a_score_has_the_same_bits_in_any_company(form: Format) -> None:
    """A chunk of one sequence, whose queries share tiles, and the same queries as sequences of their own."""
    count, asked, width = 300, 20, 64
    stored = form.empty(count + 4 * BLOCK, width, 0)
    keys = paged(stored, [count])
    entries = torch.arange(count)
    fill(stored, keys.blocks[entries // BLOCK] * BLOCK + entries % BLOCK, random(count, width))
    query, weights = random(asked, 5, width, seed=1).bfloat16(), random(asked, 5, seed=2)
    chunk = Segments((0, asked), (count - asked,))
    together = scores_of(indexer.Rows(query, weights, keys, chunk, 1, 6), asked, count)
    each = Segments(range(asked + 1), range(count - asked, count))
    own = PagedRows(stored, keys.blocks.repeat(asked), range(0, asked * len(keys.blocks) + 1, len(keys.blocks)), BLOCK)
    apart = scores_of(indexer.Rows(query, weights, own, each, 1, 6), asked, count)
    for row in range(asked):
        seen = count - asked + row + 1
        assert torch.equal(together[row, :seen], apart[row, :seen]) and not apart[row, :seen].isnan().any()


@pytest.mark.parametrize("form", INDEX_FORMATS, ids=lambda form: form.name)
def test_bfloat16_queries_cost_no_more_than_fp32_sums(form: Format) -> None:
    """Products of the held values are exact; each of the sums of `width` and `heads` numbers rounds in fp32."""
    count, heads, width = 260, 5, 96
    stored = form.empty(count + 4 * BLOCK, width, 0)
    keys = paged(stored, [count])
    entries = torch.arange(count)
    slots = keys.blocks[entries // BLOCK] * BLOCK + entries % BLOCK
    fill(stored, slots, random(count, width) * torch.exp2(random(count, 1, seed=4) * 4))
    query, weights = random(1, heads, width, seed=1).bfloat16(), random(1, heads, seed=2)
    step = indexer.Rows(query, weights, keys, Segments((0, 1), (count - 1,)), 1, 6)
    held = REFERENCE.read_rows(stored, slots).double()
    products = query[0].double() @ held.T
    exact = (products.relu() * weights[0].double()[:, None]).sum(0)
    sizes = ((query[0].double().abs() @ held.abs().T) * weights[0].double().abs()[:, None]).sum(0)
    assert ((scores_of(step, 1, count)[0].double() - exact).abs() <= (width + heads) * 2.0**-24 * sizes).all()


def test_kv_rows_as_keys() -> None:
    """No model has such keys; they are read as the reference does."""
    stored = StoredRows(torch.zeros(64, 88, dtype=torch.uint8), Packing.FP8_KV, 64, 16)
    fill(stored, torch.arange(64), whole(64, 64))
    keys, queries = paged(stored, [40]), Segments((0, 1), (39,))
    query, weights = whole(1, 2, 64, seed=1), torch.ones(1, 2)
    ours = KERNELS.index_topk(query, weights, keys, queries, 1, 7)
    assert torch.equal(ours, REFERENCE.index_topk(query, weights, keys, queries, 1, 7))
