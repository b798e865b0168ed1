"""Not yet in Triton: the reference's own."""

from thalweg.kernels.reference.indexer import index_topk

__all__ = ["index_topk"]
