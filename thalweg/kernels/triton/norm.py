"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.norm import rms_norm

__all__ = ["rms_norm"]
