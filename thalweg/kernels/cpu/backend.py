"""The CPU backend as a whole: compiled ops, and another backend's where those already serve."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from thalweg.kernels.cpu import compressor, hyper_connection, linear, moe, quantize, rows
from thalweg.kernels.cpu.library import Library
from thalweg.kernels.deterministic.backend import deterministic_kernels
from thalweg.kernels.ops import Kernels


def cpu_kernels(library: Library) -> Kernels:
    """For activations in fp32. What is not compiled comes from the deterministic backend."""
    return replace(
        deterministic_kernels(),
        pack=partial(linear.pack, library),
        linear=partial(linear.linear, library),
        grouped_linear=partial(linear.grouped_linear, library),
        mix_in=partial(hyper_connection.mix_in, library),
        mix_head=partial(hyper_connection.mix_head, library),
        compress=partial(compressor.compress, library),
        route=partial(moe.route, library),
        swiglu=partial(moe.swiglu, library),
        experts=partial(moe.experts, library),
        round_kv=partial(quantize.round_kv, library),
        round_index=partial(quantize.round_index, library),
        round_index_fp8=partial(quantize.round_index_fp8, library),
        store_rows=partial(rows.store_rows, library),
        read_rows=partial(rows.read_rows, library),
    )
