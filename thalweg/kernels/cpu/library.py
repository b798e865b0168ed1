"""The compiled kernels: which library this machine can run, and its functions with their argument types."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from ctypes import c_float, c_long, c_void_p
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_TYPES = {"p": c_void_p, "n": c_long, "f": c_float}
# p: address of a contiguous tensor's data, or 0; n: whole number; f: float. The order is that of native/*.cpp.
SIGNATURES = {
    "linear": "pnnpnnnpn",
    "route": "ppnnnfnppn",
    "swiglu": "ppnfpn",
    "experts": "pppnnnpnpnnnfpn",
    "compress": "ppnnnppnpn",
    "store_rows": "pnnppnnnnn",
    "read_rows": "pnpnnnnpn",
    "round_rows": "pnnnnpn",
}


class Level(StrEnum):
    """Instruction sets that there is a library for, lowest first."""

    PLAIN = "plain"
    AVX2 = "avx2"
    AVX512 = "avx512"


class LibraryMissing(Exception):
    """Why there are no compiled kernels; the text is for the user."""


@dataclass(frozen=True)
class Library:
    """One loaded library. `lanes` are the floats of its vectors."""

    level: Level
    lanes: int
    functions: dict[str, Callable[..., None]]

    def __post_init__(self) -> None:
        self.__dict__.update(self.functions)  # found at once: __getattr__ costs a microsecond

    @property
    def threads(self) -> int:
        """How many a kernel may use."""
        return torch.get_num_threads()

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(name)


def built_levels() -> tuple[Level, ...]:
    """Levels whose library is installed, lowest first."""
    return tuple(level for level in Level if _path(level).exists())


def machine_level() -> Level:
    """The highest level that this processor has. Raises LibraryMissing."""
    plain = _open(Level.PLAIN)
    return tuple(Level)[plain.thalweg_level()]


def load_library(level: Level | None = None) -> Library:
    """The best library for this machine, or the given one. Raises LibraryMissing."""
    highest = machine_level()
    usable = [one for one in built_levels() if tuple(Level).index(one) <= tuple(Level).index(highest)]
    if level is not None and level not in usable:
        why = f"this processor has no {level.value}" if _path(level).exists() else "it was not built"
        raise LibraryMissing(f"no {level.value} kernels: {why}")
    chosen = level or usable[-1]
    shared = _open(chosen)
    functions = {}
    for name, types in SIGNATURES.items():
        function = getattr(shared, f"thalweg_{name}")
        function.argtypes, function.restype = [_TYPES[letter] for letter in types], None
        functions[name] = function
    return Library(chosen, shared.thalweg_lanes(), functions)


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's data begin; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "kernels read plain memory"
    return tensor.data_ptr()


def wide(tensor: Tensor) -> Tensor:
    """fp32 and contiguous; the tensor itself if it is both already."""
    return (tensor if tensor.dtype is torch.float32 else tensor.to(torch.float32)).contiguous()


def _path(level: Level) -> Path:
    return _FOLDER / f"lib{level.value}.so"


def _open(level: Level) -> ctypes.CDLL:
    path = _path(level)
    if not path.exists():
        raise LibraryMissing(f"the C++ kernels were not built for {platform.machine()} when thalweg was installed")
    try:
        return ctypes.CDLL(str(path))  # after torch, whose OpenMP it then shares: one pool of threads
    except OSError as error:
        raise LibraryMissing(f"{path.name} cannot be loaded: {error}") from error
