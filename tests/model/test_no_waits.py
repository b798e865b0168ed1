"""A step asks its device for nothing: no number is read, no tensor is made of Python's own numbers, and no size depends
on values. On a CPU that would go unnoticed, so every operation of torch is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.kernels.backends import COMPILED, Kernels
from tests.model.fields import FLASH_LIKE
from tests.model.geometries import config_of, engine_weights
from tests.model.paging import PagedSequences
from tests.model.test_padding import words
from thalweg.kernels.ops import Kernels as Ops
from thalweg.kernels.registry import reference_kernels
from thalweg.model import parts
from thalweg.model.graphs import GraphedModel, StepLimits
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "a number is read",
    aten.nonzero.default: "a size depends on values",
    aten.masked_select.default: "a size depends on values",
    aten.bincount.default: "a size depends on values",
    aten.repeat_interleave.Tensor: "a size depends on values",
    aten.equal.default: "a number is read",
    aten.lift_fresh.default: "a tensor is made of Python's numbers",
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class NoWaits(TorchDispatchMode):
    """Raises where a GPU would be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in WAITS, f"{function}: {WAITS[function]}"
        if function in INDEXED:
            masks = [index for index in args[1] if index is not None and index.dtype is torch.bool]
            assert not masks, f"{function}: how many a mask picks depends on values"
        return function(*args, **(kwargs or {}))


class Watched:
    """A capture that computes again, watched."""

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def again() -> Tensor:
            with NoWaits():
                return compute()

        return again


def aside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, not looked into."""

    def called(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **named)

    return called


def unwatched(kernels: Kernels) -> Kernels:
    """What a backend has from the reference, which is for any device and may wait, is not looked into."""
    plain = reference_kernels()
    ops = {op.name: getattr(kernels, op.name) for op in fields(Ops)}
    return replace(kernels, **{name: aside(f) for name, f in ops.items() if f is getattr(plain, name)})


@pytest.mark.parametrize("wait", [lambda x: int(x[0]), lambda x: x[x > 1], lambda x: x[[0, 1]], lambda x: x.nonzero()])
def test_waits_are_seen(wait: Callable[[Tensor], Any]) -> None:
    x = torch.arange(4)
    with pytest.raises(AssertionError), NoWaits():
        wait(x)
    with NoWaits():
        torch.cat([x[1:], x[torch.arange(2)]]).view(-1, 1).float().softmax(0)


def steps(cache: PagedSequences) -> Iterator[tuple[Any, list[int] | None]]:
    """Prompts that complete entries, decodes that complete none, some and all kinds, and both beside each other."""
    yield [(0, 0, words(126, 0)), (1, 0, words(5, 1))], [130]
    yield [(0, 126, [3]), (1, 5, [4])], None
    yield [(0, 127, [3]), (1, 6, [4])], None
    yield [(0, 128, [3]), (1, 7, words(121, 2))], [0]
    yield [(0, 129, [3])], []


@pytest.mark.parametrize("kernels", [COMPILED[name]() for name in list(COMPILED)[-1:]], ids=list(COMPILED)[-1:])
def test_no_step_waits(kernels: Kernels) -> None:
    config = config_of(FLASH_LIKE)
    model = Model(config, engine_weights(config), Numerics(), unwatched(kernels))
    cache = PagedSequences(config, 2, 256)
    graphs = GraphedModel(model, cache, torch.device("cpu"), StepLimits(2, 256), Watched())
    for pieces, outputs in steps(cache):
        step = cache.inputs(pieces, outputs)
        graphs.forward(step)
        moved = parts.carried(step, Tensor.clone)
        with NoWaits():
            model.forward(moved, cache)
    assert graphs.captured == 2
