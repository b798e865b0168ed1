"""Triton's kernels of rows with bfloat16 inputs: within what rounding to bfloat16 explains of the float64 result, and
exact where nothing is rounded (verification.NARROW_TOLERANCE)."""

from __future__ import annotations

import pytest
import torch

from thalweg.kernels.backends import Backend
from thalweg.kernels.cases.checks import check_cases
from thalweg.kernels.triton.backend import TritonMissing, triton_kernels
from thalweg.kernels.verification import verdicts

FEW_ROWS = 3  # for the interpreter's sake; more of them are the same arithmetic
OPS = ("rms_norm", "rotate", "norm_rotate", "rotate_to", "mix_in", "mix_out", "mix_head", "round_kv", "round_index")


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_inputs(op: str) -> None:
    try:
        backend = Backend("triton", triton_kernels(), exact=True)
    except TritonMissing as missing:
        pytest.skip(str(missing))
    cases = [case for case in check_cases() if case.op == op and case.rows <= FEW_ROWS]
    (verdict,) = verdicts((backend,), cases, 0, lambda: None, torch.bfloat16)
    assert verdict.cases == len(cases) > 0 and not verdict.failures
