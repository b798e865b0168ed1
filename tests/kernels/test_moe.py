"""route and experts against loops; the registry's table; the costs of kernels/spec.py."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import Kernels, every_backend
from thalweg.errors import ConfigError
from thalweg.kernels import ops
from thalweg.kernels.registry import select_kernels
from thalweg.kernels.spec import OPS, spec_of


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_backend()
def test_the_bias_selects_only(kernels: Kernels) -> None:
    logits, bias = random(9, 6) * 3, random(6, seed=1) * 2
    ids, weights = kernels.route(logits, bias, None, 2, 1.5)
    for t in range(9):
        scores = torch.sqrt(torch.log1p(torch.exp(logits[t].double())))
        best = sorted(range(6), key=lambda e: (-float(scores[e] + bias[e].double()), e))[:2]
        assert sorted(ids[t].tolist()) == sorted(best)
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            expected = float(scores[e] / sum(scores[b] for b in best)) * 1.5
            assert abs(weight - expected) <= spec_of("route").tolerance


@every_backend()
def test_ties_go_to_the_lowest_expert_and_hashing_overrides(kernels: Kernels) -> None:
    ids, _ = kernels.route(torch.zeros(2, 5), torch.zeros(5), None, 3, 1.0)
    assert ids.tolist() == [[0, 1, 2]] * 2
    chosen = torch.tensor([[4, 1], [2, 3]])
    ids, weights = kernels.route(random(2, 5), None, chosen, 2, 2.0)
    assert torch.equal(ids, chosen)
    assert torch.allclose(weights.sum(-1), torch.tensor(2.0))


@every_backend()
def test_experts(kernels: Kernels) -> None:
    hidden, inner, limit = 8, 6, 1.0
    x, up, down = random(7, hidden), random(5, 2 * inner, hidden, seed=1), random(5, hidden, inner, seed=2)
    ids = torch.tensor([[0, 1], [1, 0], [3, 4], [4, 0], [0, 3], [1, 4], [3, 1]])  # nobody asks expert 2
    weights = random(7, 2, seed=3).abs()
    ours = kernels.experts(x, ids, weights, kernels.pack(up), kernels.pack(down), limit)
    clamped = 0
    for t in range(7):
        expected = torch.zeros(hidden, dtype=torch.float64)
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            both = up[e].double() @ x[t].double()
            gate, linear = both[:inner].clamp(max=limit), both[inner:].clamp(-limit, limit)
            clamped += int((both.abs() > limit).sum())
            expected += down[e].double() @ (weight * gate * torch.sigmoid(gate) * linear)
        assert (ours[t].double() - expected).abs().max() <= spec_of("experts").tolerance
    assert clamped > 0


def test_every_op_has_a_specification_and_a_choice() -> None:
    packed, *names = [field.name for field in fields(ops.Kernels)]  # packing is no part of a forward pass
    assert [spec.name for spec in OPS] == sorted(names, key=[spec.name for spec in OPS].index)
    names = [packed, *names]
    choices = select_kernels(torch.device("cpu"), wanted="reference").choices
    assert [choice.op for choice in choices] == names
    assert all(choice.backend == "reference" and choice.reason == "as set" for choice in choices)
    fixed = select_kernels(torch.device("cpu"), deterministic=True, wanted="reference").choices
    assert [choice.op for choice in fixed] == names
    same = {choice.op for choice in fixed if choice.backend == "reference"}
    own_rows = {"pack", "rms_norm", "rotate", "round_kv", "round_index", "round_index_fp8", "store_rows", "read_rows"}
    assert same == own_rows and len({choice.reason for choice in fixed}) == 2
    with pytest.raises(ConfigError, match=r"deterministic: .* cuda"):
        select_kernels(torch.device("cuda"), deterministic=True)


def test_costs_grow_with_shapes() -> None:
    for spec in OPS:
        small, large = dict.fromkeys(spec.sizes, 2), dict.fromkeys(spec.sizes, 4)
        assert 0 < spec.flops(small) < spec.flops(large)
        assert 0 < spec.bytes(small) < spec.bytes(large)
