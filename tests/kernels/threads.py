"""Tests that run with one, two and three threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.backends import interpreted


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    given = getattr(request.node, "callspec", None)
    if request.param > 1 and given is not None and "kernels" in given.params and interpreted(given.params["kernels"]):
        pytest.skip("the interpreter has one thread")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ANY_THREADS = pytest.mark.usefixtures("threads")
