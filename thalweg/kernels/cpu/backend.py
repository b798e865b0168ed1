"""The CPU backend as a whole: compiled ops, and another backend's where those already serve."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from thalweg.kernels.cpu import attention, hyper_connection, indexer, linear, moe, norm, rotary
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
        mix_in=partial(hyper_connection.mix_in, library),
        mix_out=partial(hyper_connection.mix_out, library),
        mix_head=partial(hyper_connection.mix_head, library),
        attention=partial(attention.attention, library),
        index_topk=partial(indexer.index_topk, library),
        experts=partial(moe.experts, library),
    )
