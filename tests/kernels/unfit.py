"""Kernels that must not ship, compiled: `python -m tests.kernels.unfit` prints what the compiler's check says of them.

A process of its own, since the tests' own interprets kernels.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import triton
import triton.language as tl

from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.offline import compile_launch

TYPES = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32"}
SIZES = {"ROWS": 64, "COLUMNS": 512, "WIDTH": 64}


@triton.jit
def product(a, b, out, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, n, WIDTH):
        left = tl.load(a + row[:, None] * n + begin + inner[None, :])
        right = tl.load(b + (begin + inner[:, None]) * COLUMNS + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], total)


@triton.jit
def plain(a, b, out, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(a + at).to(tl.float32) + tl.load(b + at).to(tl.float32))


def launch(kernel: object, warps: int, stages: int, *, matrix: bool = True) -> Launch:
    options = {"num_warps": warps, "num_stages": stages}
    return Launch("linear", "of a test", kernel, TYPES, SIZES, options, matrix, ("n",))


def main() -> None:
    found = {
        "fits": compile_launch(launch(plain, 4, 1, matrix=False), "sm_90a"),
        "spills": compile_launch(launch(product, 4, 1), "sm_90a"),
        "overflows": compile_launch(launch(product, 8, 5), "sm_100a"),
        "no tensor cores": compile_launch(launch(plain, 4, 1), "sm_90a"),
    }
    print(json.dumps({name: asdict(one) for name, one in found.items()}))


if __name__ == "__main__":
    main()
