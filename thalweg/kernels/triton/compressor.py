"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.compressor import compress, insert_entries

__all__ = ["compress", "insert_entries"]
