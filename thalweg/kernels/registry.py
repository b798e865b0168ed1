"""Chooses a backend for every op, once at start-up, and says why."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial

import torch

from thalweg.errors import ConfigError
from thalweg.kernels.compilations import Compilations
from thalweg.kernels.cpu.backend import cpu_kernels
from thalweg.kernels.cpu.calls import Calls
from thalweg.kernels.cpu.library import Level, LibraryMissing, load_library
from thalweg.kernels.deterministic.backend import deterministic_kernels
from thalweg.kernels.ops import Capture, Kernels, MakeRepeat
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels
from thalweg.kernels.triton.graphs import CudaGraphs, watch_compilations

__all__ = ["KernelChoice", "KernelSet", "cpu_kernels", "deterministic_kernels", "reference_kernels", "select_kernels"]


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """One row of the start-up table."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The chosen functions and the reasons. `exact`: a row's bits depend on that row alone. `forms`: those of
    weights that they multiply by as they are, under any activations: bfloat16, float8_e4m3fn for FP8 with scales, uint8
    for pairs of FP4 with scales. `missing`: why there are no compiled kernels where a device could have them.
    `repeat` makes what repeats steps, where these kernels can be repeated; `capture` captures steps on a GPU. All that
    is compiled or captured is noted in `compilations`."""

    kernels: Kernels
    choices: tuple[KernelChoice, ...]
    exact: bool = False
    forms: frozenset[torch.dtype] = frozenset()
    missing: str = ""
    repeat: MakeRepeat | None = None
    capture: Capture | None = None
    compilations: Compilations = field(default_factory=Compilations)


def select_kernels(
    device: torch.device,
    *,
    deterministic: bool = False,
    compute: torch.dtype = torch.float32,
    wanted: str = "auto",
) -> KernelSet:
    """The best available backend per op for a device: `wanted` is auto, reference, triton or a Level of
    the compiled kernels.

    Raises ConfigError if the device has no deterministic one, or none as wanted.
    """
    if deterministic and device.type != "cpu":
        raise ConfigError(f"deterministic: there are no such kernels for {device.type} yet", param="deterministic")
    if wanted == "triton" or (wanted == "auto" and device.type == "cuda"):
        return _triton(device, wanted)
    try:
        return _compiled(device, compute, wanted)
    except LibraryMissing as missing:
        if wanted not in ("auto", "reference"):
            raise ConfigError(f"kernels: {missing}", param="kernels") from missing
        return _plain(device, deterministic, str(missing))


def _triton(device: torch.device, wanted: str) -> KernelSet:
    try:
        kernels = triton_kernels()
    except TritonMissing as missing:
        if wanted != "auto":
            raise ConfigError(f"kernels: {missing}", param="kernels") from missing
        return _plain(device, False, str(missing))
    plain = reference_kernels()
    why = "as set" if wanted != "auto" else f"the kernels for {device.type}"
    own = {op.name: getattr(kernels, op.name) is not getattr(plain, op.name) for op in fields(Kernels)}
    choices = (
        KernelChoice(op, "triton" if ours else "reference", why if ours else "torch's own is as good")
        for op, ours in own.items()
    )
    forms = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.uint8})
    compilations = Compilations()
    watch_compilations(compilations)
    capture = CudaGraphs(compilations) if device.type == "cuda" else None
    choices_ = tuple(choices)
    return KernelSet(kernels, choices_, exact=True, forms=forms, capture=capture, compilations=compilations)


def _compiled(device: torch.device, compute: torch.dtype, wanted: str) -> KernelSet:
    if wanted == "reference":
        raise LibraryMissing("as set")
    if device.type != "cpu":
        raise LibraryMissing(f"the only backend for {device.type}")
    if compute is not torch.float32:
        raise LibraryMissing("the compiled kernels compute in float32")
    library = load_library(None if wanted == "auto" else Level(wanted))
    kernels, others = cpu_kernels(library), deterministic_kernels()
    plain = reference_kernels()
    why = "as set" if wanted != "auto" else "the highest instruction set of this processor"
    choices = []
    for op in fields(Kernels):
        function = getattr(kernels, op.name)
        if function is getattr(plain, op.name):
            choices.append(KernelChoice(op.name, "reference", "each row is computed by itself already"))
        elif function is getattr(others, op.name):
            choices.append(KernelChoice(op.name, "deterministic", "not compiled; bits of a row depend on it alone"))
        else:
            choices.append(KernelChoice(op.name, f"cpu-{library.level.value}", why))
    forms = frozenset({torch.bfloat16})
    return KernelSet(kernels, tuple(choices), exact=True, forms=forms, repeat=partial(Calls, library))


def _plain(device: torch.device, deterministic: bool, missing: str) -> KernelSet:
    reference = reference_kernels()
    kernels = deterministic_kernels() if deterministic else reference
    choices = []
    for op in fields(Kernels):
        if not deterministic:
            choices.append(KernelChoice(op.name, "reference", missing))
        elif getattr(kernels, op.name) is getattr(reference, op.name):
            choices.append(KernelChoice(op.name, "reference", "each row is computed by itself already"))
        else:
            choices.append(KernelChoice(op.name, "deterministic", "as set: bits of a row depend on that row alone"))
    return KernelSet(kernels, tuple(choices), exact=deterministic, missing=missing if device.type == "cpu" else "")
