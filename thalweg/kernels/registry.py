"""Chooses a backend for every op, once at start-up, and says why."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import torch

from thalweg.errors import ConfigError
from thalweg.kernels.cpu.backend import cpu_kernels
from thalweg.kernels.cpu.calls import Calls
from thalweg.kernels.cpu.library import Level, LibraryMissing, load_library
from thalweg.kernels.deterministic.backend import deterministic_kernels
from thalweg.kernels.ops import Kernels, MakeRepeat
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels

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
    `repeat` makes what repeats steps, where these kernels can be repeated."""

    kernels: Kernels
    choices: tuple[KernelChoice, ...]
    exact: bool = False
    forms: frozenset[torch.dtype] = frozenset()
    missing: str = ""
    repeat: MakeRepeat | None = None


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
    own = {field.name: getattr(kernels, field.name) is not getattr(plain, field.name) for field in fields(Kernels)}
    choices = (
        KernelChoice(op, "triton" if ours else "reference", why if ours else "torch's own is as good")
        for op, ours in own.items()
    )
    forms = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.uint8})
    return KernelSet(kernels, tuple(choices), exact=True, forms=forms)


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
    for field in fields(Kernels):
        function = getattr(kernels, field.name)
        if function is getattr(plain, field.name):
            choices.append(KernelChoice(field.name, "reference", "each row is computed by itself already"))
        elif function is getattr(others, field.name):
            choices.append(KernelChoice(field.name, "deterministic", "not compiled; bits of a row depend on it alone"))
        else:
            choices.append(KernelChoice(field.name, f"cpu-{library.level.value}", why))
    return KernelSet(
        kernels, tuple(choices), exact=True, forms=frozenset({torch.bfloat16}), repeat=partial(Calls, library)
    )


def _plain(device: torch.device, deterministic: bool, missing: str) -> KernelSet:
    reference = reference_kernels()
    kernels = deterministic_kernels() if deterministic else reference
    choices = []
    for field in fields(Kernels):
        if not deterministic:
            choices.append(KernelChoice(field.name, "reference", missing))
        elif getattr(kernels, field.name) is getattr(reference, field.name):
            choices.append(KernelChoice(field.name, "reference", "each row is computed by itself already"))
        else:
            choices.append(KernelChoice(field.name, "deterministic", "as set: bits of a row depend on that row alone"))
    return KernelSet(kernels, tuple(choices), exact=deterministic, missing=missing if device.type == "cpu" else "")
