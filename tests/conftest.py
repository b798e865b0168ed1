"""For all tests."""

from __future__ import annotations

import os

# The models here are tiny and many engines live in one process: more OpenMP threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it when it is first imported: its kernels then run on the CPU, in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
