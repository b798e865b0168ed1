"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.hyper_connection import mix_head, mix_in, mix_out

__all__ = ["mix_head", "mix_in", "mix_out"]
