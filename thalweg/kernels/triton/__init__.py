"""Kernels for NVIDIA GPUs in Triton, one file per op like the reference; on a CPU only through Triton's interpreter."""
