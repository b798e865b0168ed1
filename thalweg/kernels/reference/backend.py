"""The reference backend as a whole."""

from __future__ import annotations

from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference import (
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


def reference_kernels() -> Kernels:
    """Plain torch for every op; runs on any device."""
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
