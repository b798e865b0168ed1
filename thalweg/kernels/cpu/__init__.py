"""Ops in C++ for x86 and other CPUs, in fp32 over packed weights (docs/cpu-kernels.md). File names are the reference's.

`native/` holds the sources, `library.py` loads what the installation built of them. Each op is a function of the
library and then of what ops.py says; backend.py binds the two. Every row of a result has the same bits whatever other
rows are computed with it: deterministic mode costs nothing here.
"""
