"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.compressor import compress

__all__ = ["compress"]
