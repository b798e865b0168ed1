"""Independent twins of the byte formats of cache rows: plain Python over single numbers."""

from __future__ import annotations

import math
import struct

import numpy as np

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 2.0**127


def e4m3_value(code: int) -> float:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, the last code is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = tuple(e4m3_value(code) for code in range(127))  # the finite values from zero up


def e4m3_code(value: float) -> int:
    """The nearest, ties to the even code; beyond the range the largest."""
    if math.isnan(value):
        return 0x7F
    code = min(range(127), key=lambda c: (abs(E4M3[c] - abs(value)), c % 2))
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def e2m1_value(code: int) -> float:
    return math.copysign(E2M1[code & 7], -1.0 if code & 8 else 1.0)


def e2m1_code(value: float) -> int:
    code = min(range(8), key=lambda c: (abs(E2M1[c] - abs(value)), c % 2))
    return code | (8 if math.copysign(1, value) < 0 else 0)


def ue8m0_value(code: int) -> float:
    return math.nan if code == 255 else 2.0 ** (code - 127)


def ue8m0_code(largest: float, most: float, least: float) -> int:
    """The smallest power of two under which `largest` is at most `most`; magnitudes below `least` count as `least`."""
    quotient = float(np.float32(max(largest, least)) / np.float32(most))
    return 127 + next(e for e in range(-126, 128) if 2.0**e >= quotient)


def bf16(value: float) -> bytes:
    """Round to nearest, ties to even, of the upper half of the fp32 bits."""
    if math.isnan(value):
        return b"\xc0\x7f"
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def limited(values: list[float]) -> list[float]:
    return [v if math.isnan(v) else max(-LARGEST, min(LARGEST, v)) for v in values]


def pack_kv(row: list[float], rope_dim: int) -> bytes:
    plain, turned = limited(row[: len(row) - rope_dim]), row[len(row) - rope_dim :]
    codes, scales = [], []
    for begin in range(0, len(plain), 64):
        block = plain[begin : begin + 64]
        scales.append(ue8m0_code(max((abs(v) for v in block if v == v), default=0.0), 448, 1e-4))
        codes += [e4m3_code(v / ue8m0_value(scales[-1])) for v in block]
    packed = bytes(codes) + b"".join(bf16(v) for v in turned) + bytes(scales)
    return packed + bytes(-len(packed) % 8)


def unpack_kv(packed: bytes, width: int, rope_dim: int) -> list[float]:
    plain = width - rope_dim
    scales = packed[plain + 2 * rope_dim :]
    turned = struct.iter_unpack("<H", packed[plain : plain + 2 * rope_dim])
    return [e4m3_value(packed[i]) * ue8m0_value(scales[i // 64]) for i in range(plain)] + [
        struct.unpack("<f", struct.pack("<I", half << 16))[0] for (half,) in turned
    ]


def pack_index_fp8(row: list[float]) -> bytes:
    values = limited(row)
    largest = max((abs(v) for v in values if v == v), default=0.0)
    scale = max(np.float32(largest) / np.float32(448), np.float32(2.0**-126))
    return bytes(e4m3_code(float(np.float32(v) / scale)) for v in values) + struct.pack("<f", scale)


def unpack_index_fp8(packed: bytes, width: int) -> list[float]:
    (scale,) = struct.unpack("<f", packed[width:])
    with np.errstate(over="ignore"):
        return [float(np.float32(e4m3_value(code)) * np.float32(scale)) for code in packed[:width]]


def pack_index_fp4(row: list[float]) -> bytes:
    values, codes, scales = limited(row), [], []
    for begin in range(0, len(values), 32):
        block = values[begin : begin + 32]
        broken = any(math.isnan(v) for v in block)
        scales.append(255 if broken else ue8m0_code(max(abs(v) for v in block), 6, 6 * 2.0**-126))
        codes += [0 if broken else e2m1_code(v / ue8m0_value(scales[-1])) for v in block]
    return bytes(codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2)) + bytes(scales)


def unpack_index_fp4(packed: bytes, width: int) -> list[float]:
    scales = packed[width // 2 :]
    nibble = [packed[i // 2] >> 4 * (i % 2) & 15 for i in range(width)]
    return [e2m1_value(code) * ue8m0_value(scales[i // 32]) for i, code in enumerate(nibble)]
