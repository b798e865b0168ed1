"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.rotary import rotate

__all__ = ["rotate"]
