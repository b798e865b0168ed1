"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.moe import experts, route, swiglu

__all__ = ["experts", "route", "swiglu"]
