"""The byte formats of cache rows, in registers: bit for bit what reference/quantize.py makes of a row.

Tiles are fp32 [R, W], W a power of two, zero where a row has ended. Powers of two are made and read as exponent bits.
The largest magnitude of a block is found among bits too, which order as the magnitudes do and put NaN above all.
Division is the rounded one. Nothing here is a product plus a sum, so no contraction can change a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Packing, StoredRows
from thalweg.kernels.reference import quantize

PACKINGS = {Packing.PLAIN: 0, Packing.FP8_KV: 1, Packing.FP8_INDEX: 2, Packing.FP4_INDEX: 3}
PLAIN, FP8_KV, FP8_INDEX, FP4_INDEX = (tl.constexpr(number) for number in PACKINGS.values())
KV_BLOCK = tl.constexpr(64)  # elements under one scale
INDEX_BLOCK = tl.constexpr(32)
_INFINITY = tl.constexpr(0x7F800000)  # as bits of fp32, as all below
_LARGEST = tl.constexpr(0x7F000000)  # 2^127
_LEAST_KV = tl.constexpr(0x38D1B717)  # 1e-4
_LEAST_INDEX = tl.constexpr(0x01C00000)  # 6 * 2^-126
_LEAST_SCALE = tl.constexpr(2.0**-126)
_MOST_PADDING = tl.constexpr(8)  # bytes, after the scales of an FP8 KV row


def row_stride(stored: StoredRows) -> int:
    """Elements (bytes, where packed) from row to row of a pool whose rows are contiguous."""
    assert stored.data.stride(1) == 1, "elements of a cache row lie beside each other"
    return stored.data.stride(0)


def tile_width(packing: Packing, width: int) -> int:
    """The least tile that holds a row, and whole blocks of it."""
    return max(triton.next_power_of_2(width), KV_BLOCK.value if packing is Packing.FP8_KV else 2)


def served_kv(config: ModelConfig) -> StoredRows:
    """The form, without any memory, of the KV rows with which a model is served."""
    packed = quantize.pack_kv(torch.zeros(1, config.head_dim), config.rope_dim)
    return StoredRows(packed.to("meta"), Packing.FP8_KV, config.head_dim, config.rope_dim)


def served_index(config: ModelConfig) -> StoredRows:
    """The same of the index keys."""
    packed = quantize.pack_index_fp4(torch.zeros(1, config.index_head_dim))
    return StoredRows(packed.to("meta"), Packing.FP4_INDEX, config.index_head_dim)


@triton.jit
def limited(x):
    """Magnitudes above 2^127, infinity too, as 2^127; NaN as it is."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    kept = tl.where(size > _INFINITY, size, tl.minimum(size, _LARGEST))
    return ((bits ^ size) | kept).to(tl.float32, bitcast=True)


@triton.jit
def _sizes(x):
    """Bits of the magnitudes."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _known_sizes(x):
    """Bits of the magnitudes, NaN left out."""
    size = _sizes(x)
    return tl.where(size > _INFINITY, 0, size)


@triton.jit
def _ceiling(x):
    """Biased exponent of the least power of two that is not below x, which is normal and positive; 255 for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits > _INFINITY, 255, (bits + 0x7FFFFF) >> 23)


@triton.jit
def power(exponent):
    """fp32 of a UE8M0 byte."""
    bits = tl.where(exponent == 0, 0x00400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _inverse(exponent):
    """The inverse of a power of two; division by it and multiplication by this round alike."""
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_blocks(x, R: tl.constexpr, W: tl.constexpr):
    """e4m3 [R, W / 64, 64] and exponents of their scales [R, W / 64]."""
    blocks = tl.reshape(limited(x), [R, W // KV_BLOCK, KV_BLOCK])
    largest = tl.maximum(tl.max(_known_sizes(blocks), 2), _LEAST_KV).to(tl.float32, bitcast=True)
    exponents = _ceiling(tl.div_rn(largest, 448.0))
    return (blocks * _inverse(exponents)[:, :, None]).to(tl.float8e4nv), exponents


@triton.jit
def e4m3_rows(x):
    """e4m3 [R, W] and the scales [R]."""
    x = limited(x)
    largest = tl.max(_known_sizes(x), 1).to(tl.float32, bitcast=True)
    scales = tl.maximum(tl.div_rn(largest, 448.0), _LEAST_SCALE)
    return tl.div_rn(x, tl.broadcast_to(scales[:, None], x.shape)).to(tl.float8e4nv), scales


@triton.jit
def e2m1_blocks(x, R: tl.constexpr, W: tl.constexpr):
    """e2m1 codes int32 [R, blocks, elements of a block] and exponents of their scales [R, blocks]."""
    BLOCK: tl.constexpr = min(W, INDEX_BLOCK)
    blocks = tl.reshape(limited(x), [R, W // BLOCK, BLOCK])
    largest = tl.maximum(tl.max(_sizes(blocks), 2), _LEAST_INDEX).to(tl.float32, bitcast=True)
    exponents = _ceiling(tl.div_rn(largest, 6.0))
    scaled = blocks * _inverse(exponents)[:, :, None]
    size = tl.abs(scaled)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    code |= (blocks.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where((exponents == 255)[:, :, None], 0, code), exponents


@triton.jit
def e2m1_values(codes):
    """fp32 of e2m1 codes int32."""
    size = codes & 7
    bits = tl.where(size > 1, (((size >> 1) + 126) << 23) | ((size & 1) << 22), size * 0x3F000000)
    return (bits | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def hadamard(x, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr, FACTOR: tl.constexpr):
    """The normalised Walsh-Hadamard transform of rows of W = 2^STEPS elements; sums in the reference's order."""
    for i in tl.static_range(STEPS):
        pairs = tl.permute(tl.reshape(x, [R, W // (2 << i), 2, 1 << i]), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [R, W])
    return x * FACTOR


@triton.jit
def round_kv_tile(x, column, plain, R: tl.constexpr, W: tl.constexpr):
    """The values that an FP8 KV row holds; columns from `plain` on are the rotated ones."""
    codes, exponents = e4m3_blocks(tl.where(column < plain, x, 0.0), R, W)
    rounded = tl.reshape(codes.to(tl.float32) * power(exponents)[:, :, None], [R, W])
    return tl.where(column < plain, rounded, x.to(tl.bfloat16).to(tl.float32))


@triton.jit
def round_fp4_tile(x, R: tl.constexpr, W: tl.constexpr):
    """The values that an FP4 key holds."""
    codes, exponents = e2m1_blocks(x, R, W)
    return tl.reshape(e2m1_values(codes) * power(exponents)[:, :, None], [R, W])


@triton.jit
def round_fp8_tile(x):
    """The values that an FP8 key holds."""
    codes, scales = e4m3_rows(x)
    return codes.to(tl.float32) * scales[:, None]


@triton.jit
def put_rows(
    data,
    slots,
    x,
    width,
    rope,
    row_bytes,
    STRIDE: tl.constexpr,
    PACKING: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Write rows x [R, W], fp32 where the format is packed, to `slots` int64 [R] of a pool; those below 0 nowhere.

    Parts of a packed row begin at any byte: they are written as bytes, of which neighbours go out together.
    """
    column = tl.arange(0, W)[None, :]
    live = (slots >= 0)[:, None]
    place = data + slots[:, None] * STRIDE
    if PACKING == PLAIN:
        tl.store(place + column, x.to(data.dtype.element_ty), mask=live & (column < width))
    elif PACKING == FP8_KV:
        plain = width - rope
        codes, exponents = e4m3_blocks(tl.where(column < plain, x, 0.0), R, W)
        codes = tl.reshape(codes.to(tl.uint8, bitcast=True), [R, W])
        tl.store(place + column, codes, mask=live & (column < plain))
        half = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        halves = tl.join((half & 255).to(tl.uint8), (half >> 8).to(tl.uint8))
        byte = (plain + 2 * (column - plain))[:, :, None] + tl.arange(0, 2)[None, None, :]
        turned = live & (column >= plain) & (column < width)
        tl.store(place[:, :, None] + byte, halves, mask=tl.broadcast_to(turned[:, :, None], [R, W, 2]))
        blocks, end = tl.cdiv(plain, KV_BLOCK), plain + 2 * rope
        block = tl.arange(0, W // KV_BLOCK)[None, :]
        tl.store(place + end + block, exponents.to(tl.uint8), mask=live & (block < blocks))
        padding = end + blocks + tl.arange(0, _MOST_PADDING)[None, :]
        tl.store(place + padding, tl.zeros([R, _MOST_PADDING], tl.uint8), mask=live & (padding < row_bytes))
    elif PACKING == FP8_INDEX:
        codes, scales = e4m3_rows(x)
        tl.store(place + column, codes.to(tl.uint8, bitcast=True), mask=live & (column < width))
        byte = tl.arange(0, 4)[None, :]
        bits = scales.to(tl.uint32, bitcast=True)[:, None] >> (8 * byte).to(tl.uint32)
        tl.store(place + width + byte, (bits & 255).to(tl.uint8), mask=live & (byte < 4))
    else:
        codes, exponents = e2m1_blocks(x, R, W)
        low, high = tl.split(tl.reshape(codes, [R, W // 2, 2]))
        pair = tl.arange(0, W // 2)[None, :]
        tl.store(place + pair, (low | (high << 4)).to(tl.uint8), mask=live & (pair < width // 2))
        BLOCKS: tl.constexpr = W // min(W, INDEX_BLOCK)
        block = tl.arange(0, BLOCKS)[None, :]
        used = block < tl.cdiv(width, INDEX_BLOCK)
        tl.store(place + width // 2 + block, exponents.to(tl.uint8), mask=live & used)


@triton.jit
def get_rows(data, slots, width, rope, STRIDE: tl.constexpr, PACKING: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Rows fp32 [R, W] of the slots int64 [R] of a pool, zero in columns from `width` on and for slots below 0."""
    column = tl.arange(0, W)[None, :]
    live = (slots >= 0)[:, None]
    place = data + slots[:, None] * STRIDE
    inside = live & (column < width)
    if PACKING == PLAIN:
        rows = tl.load(place + column, mask=inside, other=0.0).to(tl.float32)
    elif PACKING == FP8_KV:
        plain = width - rope
        codes = tl.load(place + column, mask=live & (column < plain), other=0).to(tl.float8e4nv, bitcast=True)
        block = tl.arange(0, W // KV_BLOCK)[None, :]
        used = live & (block < tl.cdiv(plain, KV_BLOCK))
        exponents = tl.load(place + plain + 2 * rope + block, mask=used, other=127).to(tl.int32)
        blocks = tl.reshape(codes.to(tl.float32), [R, W // KV_BLOCK, KV_BLOCK])
        straight = tl.reshape(blocks * power(exponents)[:, :, None], [R, W])
        byte = (plain + 2 * (column - plain))[:, :, None] + tl.arange(0, 2)[None, None, :]
        turned = tl.broadcast_to((inside & (column >= plain))[:, :, None], [R, W, 2])
        low, high = tl.split(tl.load(place[:, :, None] + byte, mask=turned, other=0).to(tl.int32))
        bits = (low | (high << 8)) << 16
        rows = tl.where(column < plain, straight, bits.to(tl.float32, bitcast=True))
    elif PACKING == FP8_INDEX:
        codes = tl.load(place + column, mask=inside, other=0).to(tl.float8e4nv, bitcast=True)
        byte = tl.arange(0, 4)[None, :]
        parts = tl.load(place + width + byte, mask=live & (byte < 4), other=0).to(tl.int32)
        scales = tl.sum(parts << (8 * byte), 1).to(tl.float32, bitcast=True)
        rows = codes.to(tl.float32) * scales[:, None]
    else:
        pair = tl.arange(0, W // 2)[None, :]
        codes = tl.load(place + pair, mask=live & (pair < width // 2), other=0).to(tl.int32)
        BLOCK: tl.constexpr = min(W, INDEX_BLOCK)
        block = tl.arange(0, W // BLOCK)[None, :]
        used = live & (block < tl.cdiv(width, INDEX_BLOCK))
        exponents = tl.load(place + width // 2 + block, mask=used, other=127).to(tl.int32)
        values = tl.reshape(e2m1_values(tl.join(codes & 15, codes >> 4)), [R, W // BLOCK, BLOCK])
        rows = tl.reshape(values * power(exponents)[:, :, None], [R, W])
    return rows
