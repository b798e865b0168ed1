"""One op with inputs of one shape, for any backend, over all rows of its result or some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.kernels.arguments import Quantised, Weight
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.linear import pack as reference_pack
from thalweg.kernels.reference.linear import widened

Call = Callable[[], Any]  # the op itself, everything prepared
Bound = Callable[[Tensor | None], Call]  # for the rows of the result that are listed; None: all of them, in order
Bind = Callable[[Kernels, torch.dtype], Bound]  # inputs of that float dtype, weights packed


class Source:
    """Random inputs from one seed, on torch's default device. `narrow`: values that bfloat16 holds exactly, in fp32."""

    def __init__(self, seed: int, *, narrow: bool = False) -> None:
        self._generator = torch.Generator(device=torch.get_default_device()).manual_seed(seed)
        self._narrow = narrow

    def normal(self, *shape: int) -> Tensor:
        return self._held(torch.randn(shape, generator=self._generator))

    def weight(self, *shape: int) -> Tensor:
        """Of a deviation under which products with inputs of deviation 1 have deviation 1 too."""
        return self._held(self.normal(*shape) * shape[-1] ** -0.5)

    def _held(self, values: Tensor) -> Tensor:
        return values.bfloat16().float() if self._narrow else values

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 from low to high, without high."""
        return torch.randint(low, high, shape, generator=self._generator)

    def order(self, count: int) -> Tensor:
        """0 to count - 1, shuffled."""
        return torch.randperm(count, generator=self._generator)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """What an op returned, as one or several tensors."""
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True, slots=True)
class Case:
    """`sizes` are those that spec.py's costs take, `rows` the rows of the result; `inputs` makes everything from a
    source. `comparable` turns a result into tensors of which equal ones are equal results, one row for each row."""

    op: str
    shape: str
    sizes: Mapping[str, float]
    rows: int
    inputs: Callable[[Source], Bind]
    comparable: Callable[[Any], tuple[Tensor, ...]] = as_tuple


@dataclass(frozen=True, slots=True)
class Wide:
    """An input that an op takes in fp32 whatever the activations are."""

    values: Tensor


Input = Tensor | Wide
Stored = Input | Quantised


def over_rows(
    call: Callable[..., Any],
    rows: tuple[Input, ...],
    *,
    weights: tuple[Stored, ...] = (),
    fixed: tuple[Input, ...] = (),
) -> Bind:
    """call(kernels, *packed weights, *fixed, *rows), where each of `rows` has one row per row of the result."""

    def bind(kernels: Kernels, dtype: torch.dtype) -> Bound:
        packed = [packed_weight(kernels, weight, dtype) for weight in weights]
        shared = [cast(x, dtype) for x in fixed]

        def bound(chosen: Tensor | None) -> Call:
            own = [x if chosen is None else x[chosen] for x in (cast(x, dtype) for x in rows)]
            return lambda: call(kernels, *packed, *shared, *own)

        return bound

    return bind


def cast(x: Input, dtype: torch.dtype) -> Tensor:
    """Floats in another dtype, wide ones not in a narrower one than fp32; whole numbers as they are."""
    if isinstance(x, Wide):
        return x.values.to(torch.promote_types(dtype, torch.float32))
    return x.to(dtype) if x.is_floating_point() else x


def packed_weight(kernels: Kernels, weight: Stored, dtype: torch.dtype) -> Weight:
    """Weights in the dtype of the activations, or in their own form where that may be another."""
    own = kernels.pack is not reference_pack
    if isinstance(weight, Quantised):
        return kernels.pack(weight if own else widened(weight).to(dtype))
    if isinstance(weight, Wide):
        return kernels.pack(cast(weight, dtype))
    keeps = weight.dtype is torch.bfloat16 and dtype is torch.float32 and own
    return kernels.pack(weight if keeps else weight.to(dtype))
