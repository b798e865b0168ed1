"""The compiled kernels: which library this machine can run, and its functions with their argument types."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from ctypes import c_float, c_long, c_void_p
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_TYPES = {"p": c_void_p, "n": c_long, "f": c_float}  # address of a contiguous tensor's data, or 0; whole number; float


class Level(StrEnum):
    """Instruction sets that there is a library for, lowest first."""

    PLAIN = "plain"
    AVX2 = "avx2"
    AVX512 = "avx512"


class LibraryMissing(Exception):
    """Why there are no compiled kernels; the text is for the user."""


class Library:
    """One loaded library: a function for each kernel of native/kernels.h. `lanes` are the floats of its vectors."""

    def __init__(self, level: Level, shared: ctypes.CDLL) -> None:
        self.level = level
        self.lanes: int = shared.thalweg_lanes()
        self.kernels = tuple(_kernels(shared))
        for name, types in self.kernels:
            function = getattr(shared, f"thalweg_{name}")
            function.argtypes, function.restype = [_TYPES[letter] for letter in types], None
            setattr(self, name, function)  # found without a detour: a step calls them a hundred times
        self.repeat = shared.thalweg_repeat
        self.repeat.argtypes = [c_void_p, c_long, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_void_p]
        self.repeat.restype = None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., None]: ...

    @property
    def threads(self) -> int:
        """How many a kernel may use."""
        return torch.get_num_threads()


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
    return Library(chosen, _open(chosen))


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's data begin; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "kernels read plain memory"
    return tensor.data_ptr()


def wide(tensor: Tensor) -> Tensor:
    """fp32 and contiguous; the tensor itself if it is both already."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _kernels(shared: ctypes.CDLL) -> Iterator[tuple[str, str]]:
    """Names, and the letters of their arguments, in the order of the library's numbers."""
    name_of, types_of = shared.thalweg_kernel_name, shared.thalweg_kernel_types
    for function in (name_of, types_of):
        function.argtypes, function.restype = [c_long], ctypes.c_char_p
    number = 0
    while (name := name_of(number)) is not None:
        yield name.decode(), types_of(number).decode()
        number += 1


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
