"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.quantize import round_index, round_index_fp8, round_kv

__all__ = ["round_index", "round_index_fp8", "round_kv"]
