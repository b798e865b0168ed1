"""One tile of a product with a weight in its own bytes, the part that linear layers and experts share.

A tile is `outputs x rows`, the weight on the left: the first operand of a tensor-core instruction may come from
registers, so FP8 and FP4 are widened to bfloat16 there and never written back; and the rows, which are the second
operand, may be as few as 32 where the first takes 64 at the least.

Widening is exact. e4m3 has 4 significant bits and e2m1 has 2, bfloat16 has 8; their scales are powers of two. So a
weight is itself in bfloat16 as long as its exponent is: for scales from 2^-117 to 2^119 (those of a trained model lie
around 2^-10). Activations are not quantised. fp32 ones are cut into three bfloat16 terms, which together have all of
their 24 bits, and every term is multiplied by the weight exactly; fp32 weights are multiplied without tensor cores.

The order in which a row's products are summed is that of this loop over the width alone, in steps of STEP from `begin`:
neither the other rows of the tile nor the row's place in it take part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.kernels.arguments import FP8_BLOCK
from thalweg.kernels.triton.mode import interpreting

SCALES_PER_BLOCK = tl.constexpr(FP8_BLOCK)
PAIRED = 128  # columns whose FP4 codes are rearranged together: a byte has column j of them and column j + 64
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv", torch.uint8: "*u8"}
HALF, GROUP = tl.constexpr(PAIRED // 2), tl.constexpr(32)
INTERPRETED = tl.constexpr(interpreting())
# The same for four bytes in one register: a third of the instructions that the compiler makes of it byte by byte.
SPREAD = tl.constexpr(
    """{
    .reg .b32 pair, bits, sign;
    prmt.b32 pair, $4, 0, 0x4140;
    shl.b32 bits, pair, 6;
    and.b32 bits, bits, 0x01C001C0;
    shl.b32 sign, pair, 12;
    and.b32 sign, sign, 0x80008000;
    or.b32 $0, bits, sign;
    shl.b32 bits, pair, 2;
    and.b32 bits, bits, 0x01C001C0;
    shl.b32 sign, pair, 8;
    and.b32 sign, sign, 0x80008000;
    or.b32 $2, bits, sign;
    prmt.b32 pair, $4, 0, 0x4342;
    shl.b32 bits, pair, 6;
    and.b32 bits, bits, 0x01C001C0;
    shl.b32 sign, pair, 12;
    and.b32 sign, sign, 0x80008000;
    or.b32 $1, bits, sign;
    shl.b32 bits, pair, 2;
    and.b32 bits, bits, 0x01C001C0;
    shl.b32 sign, pair, 8;
    and.b32 sign, sign, 0x80008000;
    or.b32 $3, bits, sign;
    }"""
)


def step_of(weight: torch.dtype) -> int:
    """Columns of the weight that one turn of the loop takes: 64 to 128 bytes of a row, and so few registers for widened
    weights that two blocks share a processor."""
    if weight is torch.float32:
        return 32
    return PAIRED if weight is torch.uint8 else 64


def options_of(outputs: int, x: torch.dtype) -> dict[str, int]:
    """How a tile is launched: a group of four warps has 64 outputs. fp32 rows leave shared memory for fewer stages."""
    warps = 4 * outputs // 64
    return {"num_warps": warps, "num_stages": 3 if x is torch.float32 else 4, "maxnreg": 32768 // (32 * warps)}


def pair_columns(codes: Tensor) -> Tensor:
    """FP4 codes uint8 [..., N, K/2] so that the low halves of 64 bytes are 64 neighbouring columns and the high halves
    the next 64: both are multiplied by columns of x as they lie. The width is filled up with zeros to whole 128."""
    short = -codes.shape[-1] % (PAIRED // 2)
    bytes_ = torch.nn.functional.pad(codes, (0, short)).unflatten(-1, (-1, 2, PAIRED // 4))
    first, second = bytes_[..., 0, :], bytes_[..., 1, :]
    even, odd = first & 15 | second << 4, first >> 4 | second & 240
    return torch.stack([even, odd], -1).flatten(-2).flatten(-2)


@triton.jit
def times(acc, w, x):
    """acc + w x for w [outputs, columns] and x [columns, rows], in fp32."""
    if w.dtype == tl.float32:
        acc = tl.dot(w, x.to(tl.float32), acc, input_precision="ieee")
    elif x.dtype == tl.float32:
        first = x.to(tl.bfloat16)
        rest = x - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(w, third, acc)
        acc = tl.dot(w, second, acc)
        acc = tl.dot(w, first, acc)
    else:
        acc = tl.dot(w, x, acc)
    return acc


@triton.jit
def power_of_two(byte):
    """e8m0 as bfloat16: the byte is its exponent, and 2^-127 is half of the least normal number."""
    return tl.maximum(byte.to(tl.int16) << 7, 64).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def spread(pairs):
    """Bits as e2m1 wants them, of the low and of the high halves of bytes."""
    if INTERPRETED:
        codes = pairs.to(tl.int16)
        low = (codes << 6 & 0x1C0) | (codes << 12 & -0x8000)
        high = (codes << 2 & 0x1C0) | (codes << 8 & -0x8000)
    else:
        low, high = tl.inline_asm_elementwise(
            SPREAD, "=r,=r,=r,=r,r", [pairs], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def e2m1(bits):
    """The value of a code as bfloat16, from its exponent and leading digit in the place of bfloat16's and its sign
    there: that is the value times 2^-126, the code's one subnormal being one there too."""
    return bits.to(tl.bfloat16, bitcast=True) * tl.full([], 2.0**126, tl.bfloat16)


@triton.jit
def scaled(w, bytes_, OUTPUTS: tl.constexpr):
    """w [outputs, 64] under two scales per output."""
    groups = tl.reshape(w, (OUTPUTS, HALF // GROUP, GROUP)) * power_of_two(bytes_)[:, :, None]
    return tl.reshape(groups, (OUTPUTS, HALF))


@triton.jit
def tile_product(
    rows, present, weight, scales, n, known, begin, end, width,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Products [OUTPUTS, ROWS] in fp32 of rows `n` of a matrix with columns begin to end of rows of x.

    `rows` [ROWS] points to their first columns, `present` and `known` are which rows of x and of the weight there are.
    WHOLE: the width is a whole number of steps.
    """
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    n = n.to(tl.int64)[:, None]
    known = known[:, None]
    x = rows[None, :]
    present = present[None, :]
    for first in range(begin, end, STEP):
        if weight.dtype.element_ty == tl.uint8:
            j = tl.arange(0, HALF)
            paired = tl.cdiv(width, STEP) * HALF
            pairs = tl.load(weight + n * paired + (first // 2 + j)[None, :], mask=known, other=0)
            groups = width // GROUP
            g = first // GROUP + tl.arange(0, HALF // GROUP)[None, :]
            there = known & (g < groups)
            later = known & (g + HALF // GROUP < groups)
            low = tl.load(scales + n * groups + g, mask=there, other=127)
            high = tl.load(scales + n * groups + g + HALF // GROUP, mask=later, other=127)
            column = (first + j)[:, None]
            below = tl.load(x + column, mask=present & (WHOLE | (column < width)), other=0.0)
            above = tl.load(x + column + HALF, mask=present & (WHOLE | (column + HALF < width)), other=0.0)
            first_codes, later_codes = spread(pairs)
            acc = times(acc, scaled(e2m1(first_codes), low, OUTPUTS), below)
            acc = times(acc, scaled(e2m1(later_codes), high, OUTPUTS), above)
        else:
            column = first + tl.arange(0, STEP)
            w = tl.load(
                weight + n * width + column[None, :], mask=known & (WHOLE | (column < width)[None, :]), other=0.0
            )
            if weight.dtype.element_ty == tl.float8e4nv:
                across = tl.cdiv(width, SCALES_PER_BLOCK)
                place = n // SCALES_PER_BLOCK * across + first // SCALES_PER_BLOCK
                w = w.to(tl.bfloat16) * power_of_two(tl.load(scales + place, mask=known, other=127))
            here = present & (WHOLE | (column < width)[:, None])
            acc = times(acc, w, tl.load(x + column[:, None], mask=here, other=0.0))
    return acc
