"""Every backend whose ops are checked against the independent twins in these tests: one line per backend."""

from __future__ import annotations

import pytest

from thalweg.kernels.ops import Kernels
from thalweg.kernels.registry import deterministic_kernels, reference_kernels

BACKENDS = {"reference": reference_kernels, "deterministic": deterministic_kernels}


def every_backend() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernels", [make() for make in BACKENDS.values()], ids=list(BACKENDS))


__all__ = ["Kernels", "every_backend"]
