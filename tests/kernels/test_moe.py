"""route and experts against loops; the registry's table; the costs of kernels/spec.py."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import COMPILED, Kernels, every_backend, interpreted
from tests.kernels.threads import ANY_THREADS, threads
from thalweg.errors import ConfigError
from thalweg.kernels import ops
from thalweg.kernels.registry import select_kernels
from thalweg.kernels.spec import OPS, spec_of

__all__ = ["threads"]


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
@pytest.mark.parametrize("experts", [1, 3, 4, 16, 17, 256])
def test_the_best_experts_come_first(kernels: Kernels, experts: int) -> None:
    """Few different scores, so that there are ties everywhere."""
    logits, bias = (random(40, experts) * 2).round(), random(experts, seed=1).round()
    k = min(experts, 6)
    ids, weights = kernels.route(logits, bias, None, k, 2.5)
    scores = torch.nn.functional.softplus(logits.double()).sqrt()
    for t in range(40):
        assert ids[t].tolist() == sorted(range(experts), key=lambda e: (-float((scores[t] + bias)[e].float()), e))[:k]
    expected = scores.gather(1, ids)
    expected = expected / expected.sum(-1, keepdim=True) * 2.5
    assert (weights.double() - expected).abs().max() <= spec_of("route").tolerance


@every_backend()
def test_far_logits(kernels: Kernels) -> None:
    logits = torch.tensor([[-80.0, -70.0, -75.0], [1e4, -1e4, 3.0], [-1e4, -1e4, 0.0], [19.9, 20.0, 20.1]])
    for chosen in (None, torch.tensor([[1, 2], [0, 2], [2, 0], [2, 1]])):
        ids, weights = kernels.route(logits, None, chosen, 2, 1.0)
        assert ids.tolist() == [[1, 2], [0, 2], [2, 0], [2, 1]]
        scores = torch.log1p(torch.exp(-logits.double().abs())).add(logits.double().clamp_min(0)).sqrt().gather(1, ids)
        expected = scores / scores.sum(-1, keepdim=True)
        assert (weights.double() - expected).abs().max() <= spec_of("route").tolerance


def experts_twin(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, limit: float) -> Tensor:
    """Token by token in float64."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for t, (chosen, shares) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
        for e, weight in zip(chosen, shares, strict=True):
            gate, linear = (up[e].double() @ x[t].double()).chunk(2)
            gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
            result[t] += down[e].double() @ (weight * gate * torch.sigmoid(gate) * linear)
    return result


@every_backend()
@ANY_THREADS
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "count", "k"),
    [
        (0, 8, 8, 2, 1),
        (1, 40, 24, 4, 2),
        (1, 300, 64, 3, 3),
        (9, 33, 20, 8, 2),
        (70, 64, 33, 4, 3),
        (900, 48, 72, 2, 2),
    ],
)
def test_experts_of_any_size(
    kernels: Kernels, tokens: int, hidden: int, inner: int, count: int, k: int, narrow: bool
) -> None:
    """Nobody asks the last expert, whose weights are NaN; bfloat16 weights where the backend keeps them."""
    if interpreted(kernels) and (narrow or tokens > 70):
        pytest.skip("too long for the interpreter; test_quantised.py has bfloat16 weights")
    up, down = random(count + 1, 2 * inner, hidden, seed=1) / hidden**0.5, random(count + 1, hidden, inner, seed=2)
    up, down = up.bfloat16().float(), (down / inner**0.5).bfloat16().float()
    up[count], down[count] = float("nan"), float("nan")
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)] or [torch.zeros(0, k)])
    ids = ids.long().view(tokens, k)
    x, weights = random(tokens, hidden), random(tokens, k, seed=4).abs()
    keeps = getattr(kernels.pack, "func", None) is not None
    packed = [kernels.pack(w.bfloat16() if narrow and keeps else w) for w in (up, down)]
    ours = kernels.experts(x, ids, weights, *packed, 10.0)
    assert ours.shape == x.shape and ours.dtype is torch.float32
    twin = experts_twin(x, ids, weights, up, down, 10.0)
    assert tokens == 0 or (ours.double() - twin).abs().max() <= spec_of("experts").tolerance


@pytest.mark.parametrize("name", COMPILED)
def test_narrow_experts_are_wide_ones(name: str) -> None:
    """Widening is exact, whether it happens at every use or once for many rows."""
    kernels = COMPILED[name]()
    up, down = random(3, 80, 96, seed=1).bfloat16(), random(3, 96, 40, seed=2).bfloat16()
    for tokens in (1, 5, 40, 300):
        x, weights = random(tokens, 96), random(tokens, 2, seed=3)
        ids = torch.randint(0, 3, (tokens, 2), generator=torch.Generator().manual_seed(4))
        wide = kernels.experts(x, ids, weights, kernels.pack(up.float()), kernels.pack(down.float()), 7.0)
        assert torch.equal(kernels.experts(x, ids, weights, kernels.pack(up), kernels.pack(down), 7.0), wide)


@every_backend()
def test_experts(kernels: Kernels) -> None:
    hidden, inner, limit = 8, 6, 1.0
    x, up, down = random(7, hidden), random(5, 2 * inner, hidden, seed=1), random(5, hidden, inner, seed=2)
    ids = torch.tensor([[0, 1], [1, 0], [3, 4], [4, 0], [0, 3], [1, 4], [3, 1]])  # nobody asks expert 2
    weights = random(7, 2, seed=3).abs()
    ours = kernels.experts(x, ids, weights, kernels.pack(up), kernels.pack(down), limit)
    twin = experts_twin(x, ids, weights, up, down, limit)
    assert (ours.double() - twin).abs().max() <= spec_of("experts").tolerance
    assert (torch.einsum("end,td->ten", up, x).abs() > limit).any()


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
    own_rows = {"pack", "rms_norm", "rotate", "norm_rotate", "rotate_to", "store_rows", "read_rows", "sample"}
    assert (
        same == {*own_rows, "round_kv", "round_index", "round_index_fp8"}
        and len({choice.reason for choice in fixed}) == 2
    )
    with pytest.raises(ConfigError, match=r"deterministic: .* cuda"):
        select_kernels(torch.device("cuda"), deterministic=True)


def test_costs_grow_with_shapes() -> None:
    for spec in OPS:
        small, large = dict.fromkeys(spec.sizes, 2), dict.fromkeys(spec.sizes, 4)
        assert 0 < spec.flops(small) < spec.flops(large)
        assert 0 < spec.bytes(small) < spec.bytes(large)
