"""Matrix products with weights in their own bytes: bfloat16, fp32, FP8 or FP4.

cuBLAS multiplies plain bfloat16 faster, but chooses its kernel, and with it the order of sums, by the number of rows;
rows are to have the same bits in any company, so these products are our own. A weight's shape alone determines the tile
and the parts into which the width is cut. Every part is summed from zero and the parts are added in order, either by
one program, one after another, or, where few rows would leave most of the device idle, by a program each and a second
kernel that adds what they wrote. Both do the same sums in the same order: the number of rows decides where they run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Quantised, Weight
from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.tiles import TYPES, options_of, pair_columns, step_of, tile_product

ROWS = 64  # of x in a tile: a decode step pays for all of them, which still takes less than reading FP8 weights
OUTPUTS, FEW_OUTPUTS = 128, 64
PROGRAMS = 128  # that should be under way at least: an H100 has 132 processors, a B200 148
SHORTEST = 512  # columns of one part: shorter ones would be mostly filling and draining of the pipeline
ADDED = 1024  # elements that one program adds up
ADDING = {"num_warps": 4, "num_stages": 3}


def pack(weight: Tensor | Quantised) -> Weight:
    """bfloat16 and fp32 as they are, FP8 and FP4 with their scales; of FP4 the bytes of 128 columns are rearranged."""
    if isinstance(weight, Tensor):
        return Weight(weight.contiguous(), *weight.shape[-2:])
    data, scales = weight.data, weight.scales.contiguous()
    data = pair_columns(data) if data.dtype is torch.uint8 else data.contiguous()
    return Weight(data, weight.outputs, weight.width, scales)


def linear(x: Tensor, weight: Weight) -> Tensor:
    rows = x.reshape(-1, 1, weight.width)
    return _product(rows, weight, 1).view(*x.shape[:-1], weight.outputs)


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    return _product(x, weight, x.shape[1])


def parts(groups: int, outputs: int, width: int) -> tuple[int, int, int]:
    """Outputs of a tile, columns of a part and the number of parts, for a weight of this shape."""
    most = triton.cdiv(width, SHORTEST)
    tile = OUTPUTS if groups * triton.cdiv(outputs, OUTPUTS) * most >= PROGRAMS else FEW_OUTPUTS
    count = min(most, triton.cdiv(PROGRAMS, groups * triton.cdiv(outputs, tile)))
    length = triton.cdiv(triton.cdiv(width, count), 128) * 128
    return tile, length, triton.cdiv(width, length)


def _product(x: Tensor, weight: Weight, groups: int) -> Tensor:
    """x [R, G, K] -> [R, G, N]."""
    rows, outputs, width = len(x), weight.outputs, weight.width
    if x.stride(-1) != 1:
        x = x.contiguous()
    result = x.new_empty((rows, groups, outputs))
    if result.numel() == 0:
        return result
    tile, length, count = parts(groups, outputs, width)
    programs = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, tile)
    apart = count > 1 and programs * groups < PROGRAMS
    sums = x.new_empty((count, rows, groups, outputs), dtype=torch.float32) if apart else result
    data, scales = weight.data, weight.data if weight.scales is None else weight.scales
    product_tile[(programs, count if apart else 1, groups)](
        x, data, scales, sums, rows, outputs, width, length, x.stride(0), x.stride(1),
        data[0].numel() if data.dim() > 2 else 0, scales[0].numel() if scales.dim() > 2 else 0,
        **tile_constants(data.dtype, width, tile, 1 if apart else count), **options_of(tile, x.dtype),
    )  # fmt: skip
    if apart:
        size = result.numel()
        add_parts[(triton.cdiv(size, ADDED),)](sums, result, size, count, ADDED=ADDED, **ADDING)
    return result


def tile_constants(weight: torch.dtype, width: int, tile: int, count: int) -> dict[str, int | bool]:
    step = step_of(weight)
    return {"OUTPUTS": tile, "ROWS": ROWS, "STEP": step, "WHOLE": width % step == 0, "PARTS": count}


@triton.jit
def product_tile(
    x, weight, scales, out, rows, outputs, width, length, x_row, x_group, weight_group, scales_group,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of out [R, G, N] with all PARTS, or of one part of it in out [parts, R, G, N]. Neighbouring programs
    have the same weights and other rows."""
    row_tiles = tl.cdiv(rows, ROWS)
    m = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) // row_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    present = m < rows
    known = n < outputs
    own = x + m.to(tl.int64) * x_row + group * x_group
    weight += group * weight_group
    scales += group * scales_group
    total = tile_product(
        own, present, weight, scales, n, known, part * length, tl.minimum(part * length + length, width), width,
        OUTPUTS, ROWS, STEP, WHOLE,
    )  # fmt: skip
    if PARTS > 1:
        for number in range(1, PARTS):
            begin = number * length
            end = tl.minimum(begin + length, width)
            total += tile_product(
                own, present, weight, scales, n, known, begin, end, width, OUTPUTS, ROWS, STEP, WHOLE
            )  # fmt: skip
    row = (part.to(tl.int64) * rows + m) * tl.num_programs(2) + group
    place = out + row[None, :] * outputs + n[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=known[:, None] & present[None, :])


@triton.jit
def add_parts(parts, out, size, count, ADDED: tl.constexpr):
    """out [size] = the sum of parts [count, size], the first of them first."""
    place = tl.program_id(0).to(tl.int64) * ADDED + tl.arange(0, ADDED)
    there = place < size
    total = tl.zeros([ADDED], tl.float32)
    own = parts + place
    for _ in range(count):
        total += tl.load(own, mask=there, other=0.0)
        own += size
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there)


def launches(config: ModelConfig) -> list[Launch]:
    """Each matrix of a released model with few rows, the width's parts then being apart, and with many."""
    bf16, fp8, fp32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
    hidden, rank, groups, low = config.hidden_size, config.q_lora_rank, config.o_groups, config.o_lora_rank
    heads, shared = config.num_attention_heads * config.head_dim, config.moe_intermediate_size
    matrices = (
        ("linear", "query, down", fp8, bf16, 1, rank, hidden),
        ("linear", "query, up", fp8, bf16, 1, heads, rank),
        ("linear", "key", fp8, bf16, 1, config.head_dim, hidden),
        ("grouped_linear", "output, down", fp8, bf16, groups, low, heads // groups),
        ("linear", "output, up", fp8, bf16, 1, hidden, groups * low),
        ("linear", "index query", fp8, bf16, 1, config.index_heads * config.index_head_dim, rank),
        ("linear", "index weights", bf16, bf16, 1, config.index_heads, hidden),
        ("linear", "compressor", bf16, fp32, 1, 4 * config.head_dim, hidden),
        ("linear", "router", bf16, fp32, 1, config.num_experts, hidden),
        ("linear", "shared expert, up", fp8, bf16, 1, shared, hidden),
        ("linear", "shared expert, down", fp8, bf16, 1, hidden, shared),
        ("linear", "head", bf16, fp32, 1, config.vocab_size, hidden),
    )
    found = [launch for matrix in matrices for launch in _of_matrix(*matrix)]
    return found + [_addition(dtype) for dtype in (bf16, fp32)]


def _of_matrix(
    op: str, what: str, weight: torch.dtype, x: torch.dtype, groups: int, outputs: int, width: int
) -> list[Launch]:
    tile, _, count = parts(groups, outputs, width)
    integers = ("rows", "outputs", "width", "length", "x_row", "x_group", "weight_group", "scales_group")
    made = []
    for name, own, out in (("parts apart", 1, torch.float32), ("whole", count, x))[count == 1 :]:
        types = {"x": TYPES[x], "weight": TYPES[weight], "scales": "*u8", "out": TYPES[out]}
        types |= dict.fromkeys(integers, "i32")
        constants, options = tile_constants(weight, width, tile, own), options_of(tile, x)
        shape = f"{what} {width} to {outputs}, {name}"
        made.append(Launch(op, shape, product_tile, types, constants, options, True, integers[1:]))
    return made


def _addition(dtype: torch.dtype) -> Launch:
    types = {"parts": "*fp32", "out": TYPES[dtype], "size": "i32", "count": "i32"}
    return Launch("linear", f"parts added to {dtype}", add_parts, types, {"ADDED": ADDED}, ADDING)
