"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.rows import read_rows, store_rows

__all__ = ["read_rows", "store_rows"]
