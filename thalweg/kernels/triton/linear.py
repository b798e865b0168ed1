"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.linear import grouped_linear, linear, pack

__all__ = ["grouped_linear", "linear", "pack"]
