"""The deterministic backend as a whole: its own ops, and the reference's where those already qualify."""

from __future__ import annotations

from dataclasses import replace

from thalweg.kernels.deterministic import attention, compressor, hyper_connection, indexer, linear, moe
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.backend import reference_kernels


def deterministic_kernels() -> Kernels:
    """Bit-equal rows in any company, on a CPU. Norms, rotations, draws and roundings are the reference's: they compute
    element by element or row by row, and torch sums each row of the last axis by itself."""
    return replace(
        reference_kernels(),
        linear=linear.linear,
        grouped_linear=linear.grouped_linear,
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
    )
