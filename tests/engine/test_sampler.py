"""Sampling: truncations and penalties by hand, and draws that depend on seed and position alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.test_no_waits import aside
from thalweg.engine.request import Sequence
from thalweg.engine.sampler import Sampler
from thalweg.kernels.reference.sampling import sample
from thalweg.types import GenerateRequest, SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 3.0])


def sequence_of(output: list[int] = [], prompt: list[int] = [4], **params: Any) -> Sequence:  # noqa: B006
    request = GenerateRequest("r", np.array(prompt, np.int32), SamplingParams(**params))
    sequence = Sequence(request, lambda event: None, 100, 0.0)
    for token in output:
        sequence.append(token)
    return sequence


def draws(count: int = 400, logits: torch.Tensor = LOGITS, **params: Any) -> list[int]:
    """Tokens at the first output position under many seeds."""
    sampler = Sampler((1,))
    return [sampler.sample(logits[None], [sequence_of(**params)], [seed])[0].token for seed in range(count)]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]])
    assert Sampler((0,)).sample(logits, [sequence_of(temperature=0.0)], [0])[0].token == 1


def test_draws_follow_the_distribution() -> None:
    tokens = np.array(draws(4000, temperature=1.0))
    expected = torch.softmax(LOGITS, -1).numpy()
    seen = np.bincount(tokens, minlength=6) / len(tokens)
    assert np.abs(seen - expected).max() < 0.03


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {5}),
        ({"top_k": 3}, {5, 0, 1}),
        ({"top_p": 0.01}, {5}),
        ({"top_p": 0.8}, {5, 0}),
        ({"min_p": 0.3}, {5, 0}),
        ({"temperature": 0.05}, {5}),
        ({"top_k": 4, "min_p": 0.13}, {5, 0, 1}),
    ],
)
def test_truncations(params: dict[str, Any], allowed: set[int]) -> None:
    assert set(draws(**params)) == allowed


def test_same_seed_and_position_same_token_whatever_the_batch() -> None:
    sampler = Sampler((1,))
    alone = [sampler.sample(LOGITS[None], [sequence_of([2] * n)], [7])[0].token for n in range(20)]
    assert len(set(alone)) > 1
    batch = torch.stack([LOGITS, -LOGITS, LOGITS])
    for n, token in enumerate(alone):
        neighbours = [sequence_of([2] * n), sequence_of(), sequence_of([3] * 5)]
        assert sampler.sample(batch, neighbours, [7, 8, 9])[0].token == token


def test_penalties() -> None:
    sampler = Sampler((1,))

    def best(output: list[int], **params: Any) -> int:
        return sampler.sample(LOGITS[None], [sequence_of(output, temperature=0.0, **params)], [0])[0].token

    assert best([5], presence_penalty=1.5) == 0
    assert best([5], frequency_penalty=0.6) == 5
    assert best([5, 5], frequency_penalty=0.6) == 0
    assert best([5], repetition_penalty=2.0) == 0
    assert best([], prompt=[5], repetition_penalty=2.0) == 0
    assert best([], prompt=[5], presence_penalty=2.0) == 5  # counts output only


def test_min_tokens_masks_every_stop() -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 7.0, 1.0, 1.0])
    sampler = Sampler((1,))
    params = {"temperature": 0.0, "stop_token_ids": (2,)}
    early = sampler.sample(logits[None], [sequence_of([3], min_tokens=2, **params)], [0])[0].token
    late = sampler.sample(logits[None], [sequence_of([3, 3], min_tokens=2, **params)], [0])[0].token
    assert (early, late) == (3, 1)


def test_logprobs_are_of_the_raw_distribution() -> None:
    sampled = Sampler((1,)).sample(
        LOGITS[None], [sequence_of([5], temperature=0.0, presence_penalty=2.0, logprobs=2)], [0]
    )[0]
    raw = torch.log_softmax(LOGITS, -1)
    assert sampled.token == 0
    assert sampled.logprob == pytest.approx(float(raw[0]), abs=1e-6)
    assert [t.token for t in sampled.top] == [5, 0]
    assert sampled.top[0].logprob == pytest.approx(float(raw[5]), abs=1e-6)


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.3}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.3}, {"logprobs": 1},
    {"temperature": 0.6, "top_k": 4, "top_p": 0.9, "min_p": 0.05}, {"presence_penalty": 1.5}, {"min_tokens": 5},
    {"logit_bias": ((3, 4.0),)}, {"repetition_penalty": 1.7}, {"temperature": 0.0, "logprobs": 0},
]  # fmt: skip


def test_rows_drawn_together_and_alone_give_one_token() -> None:
    """Plain rows, and rows with something of their own between them, in any company."""
    logits = torch.randn(len(MIXED), 40, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    sampler = Sampler((1,))
    sequences = [sequence_of([3, 5], **params) for params in MIXED]
    for first in range(len(MIXED)):
        seeds = list(range(first, len(MIXED)))
        together = sampler.sample(logits[first:], sequences[first:], seeds)
        alone = [sampler.sample(logits[s : s + 1], [sequences[s]], [s])[0] for s in seeds]
        assert together == alone


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers of its tensors that Python asks for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_rows_ask_for_no_number_of_their_own(temperature: float) -> None:
    """Their tokens come as one list, which is no such question; how an op draws them is not looked into."""
    sequences = [sequence_of(temperature=temperature, top_p=0.9, top_k=20) for _ in range(8)]
    with Waits() as waits:
        Sampler((1,), aside(sample)).sample(torch.randn(8, 40), sequences, list(range(8)))
    assert waits.count == 0
