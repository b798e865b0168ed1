"""Weights in the bytes of a checkpoint: every backend multiplies by their exact values, widened or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.checkpoint.test_formats import plain_fp4, plain_fp8
from tests.kernels.backends import BACKENDS, Kernels, every_backend
from tests.kernels.test_exact_rows import rows_alone_equal
from tests.kernels.test_moe import experts_twin, random
from thalweg.checkpoint.formats import quantize_fp4, quantize_fp8
from thalweg.kernels.arguments import Quantised, joined
from thalweg.kernels.reference.linear import widened
from thalweg.kernels.spec import spec_of

FORMS = ("fp8", "fp4")
ROUNDED = 2.0**-8  # of the result: once to bfloat16
TRITON = pytest.mark.parametrize("kernels", [BACKENDS[name]() for name in BACKENDS if name == "triton"], ids=["triton"])
MIXED = 2.0**-7  # of the result: what is between two products is rounded to bfloat16 too


def quantised(form: str, *shape: int, seed: int = 0) -> tuple[Quantised, Tensor]:
    """A matrix, or several, and its exact values in fp32. Magnitudes differ from block to block."""
    made = []
    for number in range(shape[0] if len(shape) == 3 else 1):
        weight = random(*shape[-2:], seed=seed + number) * shape[-1] ** -0.5
        weight[: shape[-2] // 2] *= 4
        data, scales = quantize_fp8(weight) if form == "fp8" else quantize_fp4(weight)
        data = data if form == "fp8" else data.view(torch.uint8)
        made.append((data, scales, (plain_fp8 if form == "fp8" else plain_fp4)(data, scales)))
    data, scales, values = (torch.stack(parts) if len(shape) == 3 else parts[0] for parts in zip(*made, strict=True))
    return Quantised(data, scales), values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 64), (130, 160), (3, 129, 288), (256, 128)])
def test_widening(form: str, shape: tuple[int, ...]) -> None:
    matrix, values = quantised(form, *shape)
    assert torch.equal(widened(matrix), values) and (matrix.outputs, matrix.width) == shape[-2:]
    if shape[-2] % 256 == 0 or form == "fp4":
        assert torch.equal(widened(joined([matrix, matrix])), torch.cat([values, values]))


def code_matrices() -> list[Quantised]:
    """Every code under scales from very small to very large."""
    codes = torch.tensor([b for b in range(256) if b & 127 != 127] + [0, 0], dtype=torch.uint8).view(2, 128)
    pairs, groups = torch.arange(256, dtype=torch.uint8).view(4, 64), torch.arange(4, dtype=torch.uint8)
    fp8 = [Quantised(codes.view(torch.float8_e4m3fn), torch.tensor([[b]]).byte()) for b in (12, 117, 127, 128, 240)]
    return fp8 + [Quantised(pairs, torch.full((4, 4), b).byte() + groups) for b in (2, 117, 127, 128, 240)]


@every_backend()
def test_every_code_and_scale(kernels: Kernels) -> None:
    """Rows of the unit matrix pick single weights: nothing is rounded."""
    for matrix in code_matrices():
        assert torch.equal(kernels.linear(torch.eye(128), kernels.pack(matrix)), widened(matrix).T)


@every_backend()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 32, 1), (5, 160, 130), (3, 1312, 48)])
def test_linear(kernels: Kernels, form: str, rows: int, width: int, outputs: int) -> None:
    matrix, values = quantised(form, outputs, width)
    packed, x = kernels.pack(matrix), random(rows, width, seed=9)
    exact = x.double() @ values.double().T
    ours = kernels.linear(x, packed)
    assert ours.dtype is torch.float32 and (ours - exact).abs().max() <= 4 * spec_of("linear").tolerance


@every_backend()
@pytest.mark.parametrize("form", FORMS)
def test_grouped_linear(kernels: Kernels, form: str) -> None:
    matrix, values = quantised(form, 2, 128, 96)
    x = random(3, 2, 96, seed=9)
    exact = torch.einsum("tgk,gnk->tgn", x.double(), values.double())
    assert (kernels.grouped_linear(x, kernels.pack(matrix)) - exact).abs().max() <= 4e-4


@every_backend()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("hidden", "inner"), [(160, 64), (96, 160)])
def test_experts(kernels: Kernels, form: str, hidden: int, inner: int) -> None:
    (up, wide_up), (down, wide_down) = (
        quantised(form, 3, 2 * inner, hidden), quantised(form, 3, hidden, inner, seed=5)
    )  # fmt: skip
    x, weights = random(4, hidden, seed=9), random(4, 2, seed=10).abs()
    ids = torch.tensor([[0, 2], [2, 0], [1, 2], [0, 1]])
    ours = kernels.experts(x, ids, weights, kernels.pack(up), kernels.pack(down), 1.0)
    assert (ours - experts_twin(x, ids, weights, wide_up, wide_down, 1.0)).abs().max() <= 4e-4


@TRITON
def test_every_code_and_scale_under_bfloat16_rows(kernels: Kernels) -> None:
    for matrix in code_matrices():
        ours = kernels.linear(torch.eye(128, dtype=torch.bfloat16), kernels.pack(matrix))
        assert ours.dtype is torch.bfloat16 and torch.equal(ours.float(), widened(matrix).T)


@TRITON
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_rows(kernels: Kernels, form: str) -> None:
    """Products are exact and sums fp32: what is left is the rounding of results, and in experts of what they gate."""
    matrix, values = quantised(form, 70, 608)
    packed, x = kernels.pack(matrix), random(67, 608, seed=9).bfloat16()
    exact = x.double() @ values.double().T
    assert ((kernels.linear(x, packed) - exact).abs() <= ROUNDED * exact.abs() + 1e-4).all()
    rows_alone_equal(lambda x: kernels.linear(x, packed), x)
    (up, wide_up), (down, wide_down) = quantised(form, 4, 128, 96), quantised(form, 4, 96, 64, seed=5)
    x, weights = random(40, 96, seed=9).bfloat16(), random(40, 2, seed=10).abs()
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(40)])
    packed, packed_down = kernels.pack(up), kernels.pack(down)

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return kernels.experts(x, ids, weights, packed, packed_down, 10.0)

    twin = experts_twin(x, ids, weights, wide_up, wide_down, 10.0)
    assert ((experts(x, ids, weights) - twin).abs().amax(-1) <= MIXED * twin.abs().amax(-1)).all()
    rows_alone_equal(experts, x, ids, weights)


@TRITON
def test_few_rows_and_many_take_the_same_sums(kernels: Kernels) -> None:
    """576 columns are two parts: of few rows each by a program of its own, of many one after another."""
    weight, x = random(43 * 64, 576).bfloat16() / 25, random(180, 576, seed=9).bfloat16()
    packed = kernels.pack(weight)
    together = kernels.linear(x, packed)
    assert torch.equal(kernels.linear(x[70:72], packed), together[70:72])


def executed(code: str, word: int) -> list[int]:
    """Results of a few PTX instructions on 32-bit registers, one operand given: what the interpreter does not run."""
    values = {"$4": word}

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    def permuted(a: int, b: int, selector: int) -> int:
        every = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(every[selector >> 4 * i & 7] for i in range(4)), "little")

    operations = {
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "prmt.b32": permuted,
    }
    for line in code.strip("{} \n").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operation and not operation.startswith(".reg"):
            target, *given = (operand.strip() for operand in operands.split(","))
            values[target] = operations[operation](*map(value, given))
    return [values[f"${i}"] for i in range(4)]


def test_codes_spread_by_the_gpu_are_those_spread_by_the_interpreter() -> None:
    from thalweg.kernels.triton.tiles import SPREAD

    pairs = torch.arange(256, dtype=torch.int16).view(-1, 4)
    for numbers in pairs.tolist():
        found = executed(SPREAD.value, int.from_bytes(bytes(numbers), "little"))
        halves = [half for register in found for half in (register & 0xFFFF, register >> 16)]
        spread = [
            (code & 7) << 6 | (code & 8) << 12 for code in (*(n & 15 for n in numbers), *(n >> 4 for n in numbers))
        ]
        assert halves == spread
