"""Tests that run with one, two and three threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.backends import Kernels, interpreted


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    kernels = request.node.callspec.params.get("kernels")
    if request.param > 1 and isinstance(kernels, Kernels) and interpreted(kernels):
        pytest.skip("the interpreter runs programs one after another")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ANY_THREADS = pytest.mark.usefixtures("threads")
