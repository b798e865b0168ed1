"""Every backend that there is for this machine: what of it is its own, and why it may be missing."""

from __future__ import annotations

from dataclasses import dataclass, fields

from thalweg.kernels.cpu.backend import cpu_kernels
from thalweg.kernels.cpu.library import Level, LibraryMissing, load_library
from thalweg.kernels.deterministic.backend import deterministic_kernels
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels

REFERENCE, DETERMINISTIC, TRITON = "reference", "deterministic", "triton"


@dataclass(frozen=True, slots=True)
class Backend:
    """One set of kernels, or why this machine has none under that name.

    `exact`: a row's bits depend on that row alone. `any_threads`: nor do they depend on the number of threads, in the
    ops that are the backend's own.
    """

    name: str
    kernels: Kernels | None
    missing: str = ""
    exact: bool = False
    any_threads: bool = False

    def origin(self, op: str) -> str:
        """The backend that an op of this one really comes from."""
        assert self.kernels is not None, f"{self.name} is missing: {self.missing}"
        function = getattr(self.kernels, op)
        for name, make in ((REFERENCE, reference_kernels), (DETERMINISTIC, deterministic_kernels)):
            if function is getattr(make(), op):
                return name
        return self.name

    def own_ops(self) -> tuple[str, ...]:
        """Names of the ops that come from no other backend."""
        return tuple(field.name for field in fields(Kernels) if self.origin(field.name) == self.name)


def every_backend() -> tuple[Backend, ...]:
    """Plainest first: the references, then the compiled ones from the lowest instruction set up, then Triton's."""
    return (
        Backend(REFERENCE, reference_kernels()),
        Backend(DETERMINISTIC, deterministic_kernels(), exact=True),
        *(_compiled(level) for level in Level),
        _triton(),
    )


def _compiled(level: Level) -> Backend:
    name = f"cpu-{level.value}"
    try:
        return Backend(name, cpu_kernels(load_library(level)), exact=True, any_threads=True)
    except LibraryMissing as missing:
        return Backend(name, None, str(missing))


def _triton() -> Backend:
    try:
        return Backend(TRITON, triton_kernels(), exact=True)
    except TritonMissing as missing:
        return Backend(TRITON, None, str(missing))
