"""Attention in Triton, interpreted: decoding and prefill give a query the same bits, wherever its chunks end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention import Scene, random, sums, twin
from thalweg.config.model_parse import load_model_config
from thalweg.kernels.arguments import Segments
from thalweg.kernels.spec import spec_of
from thalweg.kernels.triton import attention as kernel
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels

try:
    KERNELS = triton_kernels()
except TritonMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)

FIRST, QUERIES = 508, 8  # entries go from 509 to 516, over the end of a chunk of 512
HEADS, K = 2, 300


def step(first: int, count: int, query: Tensor, selected: Tensor | None) -> Tensor:
    """Queries at positions first to first + count - 1, every token an entry of its own."""
    scene = Scene([first], [count], 1)
    whole = Scene([FIRST], [QUERIES], 1)
    scene.keys, scene.paged = [whole.keys[0][: first + count]], whole.paged
    queries = Segments((0, count), (first,))
    rows = slice(first - FIRST, first - FIRST + count)
    own = None if selected is None else selected[rows]
    return KERNELS.attention(query[rows], scene.new_rows(), scene.context(queries, entries=True), random(HEADS), own)


@pytest.mark.parametrize("selects", [False, True])
def test_a_query_alone_has_the_bits_that_it_has_in_a_prefill(selects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "WALKING_PROGRAMS", QUERIES)  # so many walk their chunks, fewer leave parts
    assert kernel.CHUNK[kernel.ALL] == 512 and kernel.CHUNK[kernel.SELECTED] < K
    query = random(QUERIES, HEADS, 8, seed=6)
    order = torch.Generator().manual_seed(1)
    picks = torch.stack([torch.randperm(FIRST + 1 + row, generator=order)[:K] for row in range(QUERIES)])
    picks[:, ::7] = -1
    selected = picks if selects else None
    together = step(FIRST, QUERIES, query, selected)
    whole = Scene([FIRST], [QUERIES], 1)
    for entries in (511, 512, 513, 516):
        position = entries - 1
        row = position - FIRST
        assert torch.equal(step(position, 1, query, selected)[0], together[row])
        chosen = picks[row].tolist() if selects else None
        exact = twin(whole, 0, position, query[row], random(HEADS), chosen)
        assert (together[row].double() - exact).abs().max() <= spec_of("attention").tolerance
    assert torch.equal(step(FIRST + 2, 3, query, selected), together[2:5])


def test_more_queries_than_the_workspace_has_parts_for_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    query = random(QUERIES, HEADS, 8, seed=6)
    at_once = step(FIRST + 3, 5, query, None)
    monkeypatch.setattr(kernel, "PARTS", 6)  # three chunks of a query: two queries at a time
    assert torch.equal(step(FIRST + 3, 5, query, None), at_once)


def test_bfloat16_queries() -> None:
    """Rounding q, rows (exact here) and probabilities to 8 bits: each moves a weight, or a sum of values of magnitude
    4 at the most, by a few times 2^-9 of it."""
    scene = Scene([300, 3], [2, 4], 4, 64, 128)
    query = random(6, HEADS, 64).bfloat16()
    for rows in (scene.keys, scene.entries):
        rows[:] = [row.bfloat16().float() for row in rows]
    scene.paged.rows.data[:] = scene.paged.rows.data.bfloat16().float()
    context = scene.context(Segments(sums(scene.new), tuple(scene.past)), entries=True)
    ours = KERNELS.attention(query, scene.new_rows().bfloat16(), context, random(HEADS), None)
    positions = [(s, t) for s, past in enumerate(scene.past) for t in range(past, scene.ends[s])]
    for row, (s, t) in enumerate(positions):
        exact = twin(scene, s, t, query[row].float(), random(HEADS), None)
        assert (ours[row].double() - exact).abs().max() <= 4 * 2**-9


def test_launches_name_every_argument() -> None:
    for launch in kernel.launches(load_model_config("flash")):
        assert {*launch.types, *launch.constants} == set(launch.kernel.arg_names), launch.what
