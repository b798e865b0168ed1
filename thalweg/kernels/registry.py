"""Chooses a backend for every op, once at start-up, and says why."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from thalweg.errors import ConfigError
from thalweg.kernels.deterministic.backend import deterministic_kernels
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.backend import reference_kernels

__all__ = ["KernelChoice", "KernelSet", "deterministic_kernels", "reference_kernels", "select_kernels"]


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """One row of the start-up table."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The chosen functions and the reasons."""

    kernels: Kernels
    choices: tuple[KernelChoice, ...]


def select_kernels(device: torch.device, *, deterministic: bool = False) -> KernelSet:
    """The best available backend per op for a device. Raises ConfigError if the device has no deterministic one."""
    if deterministic and device.type != "cpu":
        raise ConfigError(f"deterministic: there are no such kernels for {device.type} yet", param="deterministic")
    reference = reference_kernels()
    kernels = deterministic_kernels() if deterministic else reference
    names = [field.name for field in fields(Kernels)]
    choices = (
        _choice(name, device, deterministic, getattr(kernels, name) is getattr(reference, name)) for name in names
    )
    return KernelSet(kernels, tuple(choices))


def _choice(op: str, device: torch.device, deterministic: bool, same: bool) -> KernelChoice:
    if not deterministic:
        return KernelChoice(op, "reference", f"the only backend for {device.type}")
    if same:
        return KernelChoice(op, "reference", "each row is computed by itself already")
    return KernelChoice(op, "deterministic", "as set: bits of a row depend on that row alone")
