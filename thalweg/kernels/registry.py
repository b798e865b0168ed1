"""Chooses a backend for every op, once at start-up, and says why."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference import (
    attention,
    compressor,
    hyper_connection,
    indexer,
    moe,
    norm,
    quantize,
    rotary,
    rows,
)


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


def reference_kernels() -> Kernels:
    """Plain torch for every op; runs on any device."""
    return Kernels(
        rms_norm=norm.rms_norm,
        rotate=rotary.rotate,
        mix_in=hyper_connection.mix_in,
        mix_out=hyper_connection.mix_out,
        mix_head=hyper_connection.mix_head,
        compress=compressor.compress,
        index_topk=indexer.index_topk,
        attention=attention.attention,
        route=moe.route,
        experts=moe.experts,
        round_kv=quantize.round_kv,
        round_index=quantize.round_index,
        round_index_fp8=quantize.round_index_fp8,
        store_rows=rows.store_rows,
        read_rows=rows.read_rows,
    )


def select_kernels(device: torch.device) -> KernelSet:
    """The best available backend per op for a device."""
    reason = f"the only backend for {device.type}"
    names = [field.name for field in fields(Kernels)]
    return KernelSet(reference_kernels(), tuple(KernelChoice(name, "reference", reason) for name in names))
