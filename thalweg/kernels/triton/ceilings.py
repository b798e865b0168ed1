"""What the GPU at hand does at most, measured by torch's own copies and products: the limits beside data sheets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from thalweg.config.accelerators import Accelerator
from thalweg.kernels.floors import LAUNCH_SECONDS, Limits
from thalweg.kernels.triton.stopwatch import GraphReplay, PlainLaunch

_COPIED_BYTES = 1 << 32
_SIZE = 8192  # rows and columns of the products
_RUNS = 7


def sheet_limits(accelerator: Accelerator) -> Limits:
    """From the data sheet; the launch is that of a replayed graph, which no sheet names."""
    products = {"bf16": accelerator.bf16, "fp8": accelerator.fp8}
    if accelerator.fp4 is not None:
        products["fp4"] = accelerator.fp4
    return Limits(accelerator.bandwidth, products, accelerator.fp32, LAUNCH_SECONDS, "data sheet")


def measured_limits(device: torch.device, sheet: Limits) -> Limits:
    """Copying, bf16 and fp8 products and an empty launch, measured; what torch cannot show is the sheet's."""
    watch = PlainLaunch(device)
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = _median(watch.seconds, [lambda: target.copy_(source)])
    left, right = (torch.randn(_SIZE, _SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * _SIZE**3
    products = {"bf16": operations / _median(watch.seconds, [lambda: left @ right])}
    narrow = [x.to(torch.float8_e4m3fn) for x in (left, right.t().contiguous())]
    one = torch.ones((), device=device)
    fp8 = _median(
        watch.seconds,
        [lambda: torch._scaled_mm(narrow[0], narrow[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)],
    )
    small = torch.zeros(32, device=device)
    empty = _median(GraphReplay(device).seconds, [small.zero_] * 64)
    products["fp8"] = operations / fp8
    return Limits(2 * _COPIED_BYTES / copying, products, sheet.ordinary, empty, "measured")


def _median(seconds: Callable[[Sequence[Callable[[], Any]]], float], calls: Sequence[Callable[[], Any]]) -> float:
    return statistics.median(seconds(calls) for _ in range(_RUNS))
