"""The Triton backend as a whole, and why it may be missing."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

import torch

from thalweg.kernels.ops import Kernels
from thalweg.kernels.triton.mode import INTERPRET, interpreting
from thalweg.kernels.triton.sources import source_hash

_NOT_INSTALLED = "triton is not installed: pip install 'thalweg[gpu]'"


class TritonMissing(Exception):
    """Why this process has no Triton kernels."""


def compiler_missing() -> str:
    """Why this process cannot compile for GPUs; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return _NOT_INSTALLED
    return f"{INTERPRET} is set: this process interprets kernels and cannot compile them" if interpreting() else ""


def triton_kernels() -> Kernels:
    """Every op in Triton, for CUDA devices or, interpreted, for the CPU. Raises TritonMissing."""
    if importlib.util.find_spec("triton") is None:
        raise TritonMissing(_NOT_INSTALLED)
    if interpreting():
        from thalweg.kernels.triton.interpreter import repair

        repair()
    elif not torch.cuda.is_available():
        raise TritonMissing(f"there is no CUDA device, and {INTERPRET}=1 is not set to run its interpreter")
    return _kernels()


def triton_hashes() -> dict[str, str]:
    """Hashes of the sources of every op that has a Triton kernel; none where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return {}
    return {op: source_hash(module.rpartition(".")[2]) for op, module in op_modules().items()}


def op_modules() -> dict[str, str]:
    """The module that each op with a Triton kernel comes from. Triton must be installed."""
    kernels = _kernels()
    modules = {field.name: getattr(kernels, field.name).__module__ for field in fields(Kernels)}
    return {op: module for op, module in modules.items() if module.startswith(f"{__package__}.")}


def _kernels() -> Kernels:
    from thalweg.kernels.triton import (
        attention,
        compressor,
        hyper_connection,
        indexer,
        linear,
        moe,
        norm,
        quantize,
        rotary,
        rows,
        sampling,
    )

    return Kernels(
        pack=linear.pack,
        linear=linear.linear,
        grouped_linear=linear.grouped_linear,
        rms_norm=norm.rms_norm,
        rotate=rotary.rotate,
        norm_rotate=rotary.norm_rotate,
        rotate_to=rotary.rotate_to,
        mix_in=hyper_connection.mix_in,
        mix_out=hyper_connection.mix_out,
        mix_head=hyper_connection.mix_head,
        compress=compressor.compress,
        insert_entries=compressor.insert_entries,
        index_topk=indexer.index_topk,
        attention=attention.attention,
        route=moe.route,
        swiglu=moe.swiglu,
        experts=moe.experts,
        round_kv=quantize.round_kv,
        round_index=quantize.round_index,
        round_index_fp8=quantize.round_index_fp8,
        store_rows=rows.store_rows,
        read_rows=rows.read_rows,
        sample=sampling.sample,
    )
