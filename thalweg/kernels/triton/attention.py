"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.attention import attention

__all__ = ["attention"]
