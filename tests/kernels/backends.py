"""Every backend whose ops are checked against the independent twins in these tests: one line per backend, and one per
instruction set of the compiled kernels that this machine can run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from thalweg.kernels.cpu.library import LibraryMissing, built_levels, load_library
from thalweg.kernels.ops import Kernels
from thalweg.kernels.registry import cpu_kernels, deterministic_kernels, reference_kernels
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels
from thalweg.kernels.triton.mode import interpreting


def _compiled() -> dict[str, Callable[[], Kernels]]:
    found: dict[str, Callable[[], Kernels]] = {}
    for level in built_levels():
        try:
            library = load_library(level)
        except LibraryMissing:
            continue
        found[f"cpu-{level.value}"] = lambda library=library: cpu_kernels(library)
    return found


def _triton() -> dict[str, Callable[[], Kernels]]:
    try:
        triton_kernels()
    except TritonMissing:
        return {}
    return {"triton": triton_kernels}


COMPILED = _compiled()
BACKENDS = {"reference": reference_kernels, "deterministic": deterministic_kernels} | COMPILED | _triton()
EXACT = {"deterministic": deterministic_kernels} | COMPILED | _triton()  # a row's bits depend on that row alone


def every_backend() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernels", [make() for make in BACKENDS.values()], ids=list(BACKENDS))


def every_quick_backend() -> pytest.MarkDecorator:
    """Those whose calls take microseconds, for tests that make thousands of them."""
    quick = {name: make() for name, make in BACKENDS.items() if not interpreted(make())}
    return pytest.mark.parametrize("kernels", list(quick.values()), ids=list(quick))


def every_exact_backend() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernels", [make() for make in EXACT.values()], ids=list(EXACT))


def interpreted(kernels: Kernels) -> bool:
    """Whether these are Triton's, run by its interpreter: a thousand times as slow as the others, so that their share
    of a test is that of few rows and short contexts."""
    return interpreting() and kernels.rms_norm.__module__.startswith("thalweg.kernels.triton")


__all__ = ["Kernels", "every_backend", "every_exact_backend", "every_quick_backend", "interpreted"]
