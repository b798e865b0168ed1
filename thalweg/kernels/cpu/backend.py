"""The CPU backend as a whole: compiled ops, and another backend's where those already serve."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from thalweg.kernels.cpu import (
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
)
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
        rms_norm=partial(norm.rms_norm, library),
        rotate=partial(rotary.rotate, library),
        norm_rotate=partial(rotary.norm_rotate, library),
        rotate_to=partial(rotary.rotate_to, library),
        mix_in=partial(hyper_connection.mix_in, library),
        mix_out=partial(hyper_connection.mix_out, library),
        mix_head=partial(hyper_connection.mix_head, library),
        attention=partial(attention.attention, library),
        index_topk=partial(indexer.index_topk, library),
        compress=partial(compressor.compress, library),
        insert_entries=partial(compressor.insert_entries, library),
        route=partial(moe.route, library),
        swiglu=partial(moe.swiglu, library),
        experts=partial(moe.experts, library),
        round_kv=partial(quantize.round_kv, library),
        round_index=partial(quantize.round_index, library),
        round_index_fp8=partial(quantize.round_index_fp8, library),
        store_rows=partial(rows.store_rows, library),
        read_rows=partial(rows.read_rows, library),
    )
