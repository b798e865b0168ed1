"""The served byte formats of cache rows, and rounding to them. Plain torch.

Rounding is by definition what packing and reading back gives, so that a row read from the cache is the row that its own
step attended to. UE8M0 is a power of two by its exponent (255: NaN). NaN stays NaN: in its own element in FP8, in the
whole block in FP4, which has no NaN. Magnitudes above 2^127, infinity too, are stored as 2^127.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KV_BLOCK = 64  # elements under one scale
INDEX_BLOCK = 32
ROW_ALIGNMENT = 8  # bytes, of an FP8 KV row
_E4M3_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST = 2.0**127
_LEAST_KV = 1e-4  # blocks below it share the scale of this magnitude (model-spec 5)
_LEAST_SCALE = 2.0**-126  # the smallest normal fp32: an all-zero row divides by it


def round_kv(rows: Tensor, rope_dim: int) -> Tensor:
    plain = rows.shape[-1] - rope_dim
    codes, scales = _e4m3_blocks(rows[..., :plain])
    rounded = (codes.float() * scales).flatten(-2)[..., :plain]
    return torch.cat([rounded.to(rows.dtype), rows[..., plain:].bfloat16().to(rows.dtype)], -1)


def round_index(x: Tensor) -> Tensor:
    codes, scales = _e2m1_blocks(hadamard(x.float()))
    return (_e2m1(codes) * scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def round_index_fp8(keys: Tensor) -> Tensor:
    codes, scale = _e4m3_rows(keys)
    return codes.float() * scale


def pack_kv(rows: Tensor, rope_dim: int) -> Tensor:
    """[..., d] -> uint8: d-r e4m3, r bf16, a UE8M0 scale per 64 elements, zeros up to a multiple of 8."""
    plain = rows.shape[-1] - rope_dim
    codes, scales = _e4m3_blocks(rows[..., :plain])
    turned = rows[..., plain:].bfloat16().contiguous()
    packed = torch.cat([_bytes(codes).flatten(-2)[..., :plain], _bytes(turned), _exponents(scales)], -1)
    return F.pad(packed, (0, -packed.shape[-1] % ROW_ALIGNMENT))


def unpack_kv(packed: Tensor, width: int, rope_dim: int) -> Tensor:
    """uint8 [..., bytes of a row] -> fp32 [..., d]."""
    plain = width - rope_dim
    end = plain + 2 * rope_dim
    blocks = -(-plain // KV_BLOCK)
    scales = _powers(packed[..., end : end + blocks]).repeat_interleave(KV_BLOCK, -1)[..., :plain]
    turned = _viewed(packed[..., plain:end], torch.bfloat16).float()
    return torch.cat([_e4m3(packed[..., :plain]) * scales, turned], -1)


def pack_index_fp8(keys: Tensor) -> Tensor:
    """[..., n] -> uint8: n e4m3 and one fp32 scale."""
    codes, scale = _e4m3_rows(keys)
    return torch.cat([_bytes(codes), _bytes(scale)], -1)


def unpack_index_fp8(packed: Tensor, width: int) -> Tensor:
    scale = _viewed(packed[..., width:], torch.float32)
    return _e4m3(packed[..., :width]) * scale


def pack_index_fp4(keys: Tensor) -> Tensor:
    """Rotated keys [..., n], n even -> uint8: n/2 pairs of e2m1, the even element low; a UE8M0 scale per 32."""
    codes, scales = _e2m1_blocks(keys)
    flat = codes.flatten(-2)[..., : keys.shape[-1]]
    return torch.cat([flat[..., 0::2] | flat[..., 1::2] << 4, _exponents(scales)], -1)


def unpack_index_fp4(packed: Tensor, width: int) -> Tensor:
    pairs = packed[..., : width // 2]
    scales = _powers(packed[..., width // 2 :]).repeat_interleave(INDEX_BLOCK, -1)[..., :width]
    return _e2m1(torch.stack([pairs & 15, pairs >> 4], -1)).flatten(-2) * scales


def power_of_two(x: Tensor) -> Tensor:
    """2 ** ceil(log2(x)) for positive x, exactly; NaN for NaN."""
    mantissa, exponent = torch.frexp(x)
    power = torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(x.isnan(), x, power)


def hadamard(x: Tensor) -> Tensor:
    """The normalised Walsh-Hadamard transform of the last axis, whose size is a power of two."""
    size, step = x.shape[-1], 1
    while step < size:
        pairs = x.unflatten(-1, (-1, 2, step))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        step *= 2
    return x * size**-0.5


def _blocks(x: Tensor, size: int) -> Tensor:
    """fp32 [..., blocks, size], padded with zeros, magnitudes limited."""
    wide = x.float().clamp(-_LARGEST, _LARGEST)
    return F.pad(wide, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _e4m3_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [..., blocks, 64] and power-of-two scales fp32 [..., blocks, 1]."""
    blocks = _blocks(x, KV_BLOCK)
    scales = power_of_two(_largest(blocks).clamp_min(_LEAST_KV) / _E4M3_MAX)
    return _to_e4m3(blocks / scales), scales


def _e4m3_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [..., n] and one fp32 scale [..., 1]."""
    wide = keys.float().clamp(-_LARGEST, _LARGEST)
    scale = (_largest(wide) / _E4M3_MAX).clamp_min(_LEAST_SCALE)
    return _to_e4m3(wide / scale), scale


def _e2m1_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """e2m1 codes uint8 [..., blocks, 32] and power-of-two scales fp32 [..., blocks, 1]; NaN where a block has one."""
    blocks = _blocks(x, INDEX_BLOCK)
    scales = power_of_two(blocks.abs().amax(-1, keepdim=True).clamp_min(_E2M1[-1] * _LEAST_SCALE) / _E2M1[-1])
    return _to_e2m1(blocks / scales), scales


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of the last axis [..., 1], NaN left out."""
    return x.abs().nan_to_num(0.0).amax(-1, keepdim=True)


def _to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 value, ties to the even code; saturates, as torch's own conversion does not."""
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _to_e2m1(x: Tensor) -> Tensor:
    """Codes of the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of x in bit 3; ties go to the even code."""
    a = x.abs()
    code = (a > 0.25).byte() + (a >= 0.75).byte() + (a > 1.25).byte() + (a >= 1.75).byte()
    code = code + (a > 2.5).byte() + (a >= 3.5).byte() + (a > 5.0).byte()
    return code | torch.signbit(x).byte() << 3


def _e2m1(codes: Tensor) -> Tensor:
    table = torch.tensor(_E2M1 + tuple(-v for v in _E2M1), device=codes.device)
    return _looked_up(table, codes)


def _e4m3(codes: Tensor) -> Tensor:
    """fp32 of e4m3 bytes by table: on a CPU several times as fast as torch's conversion."""
    every = torch.arange(256, dtype=torch.uint8, device=codes.device)
    return _looked_up(every.view(torch.float8_e4m3fn).float(), codes)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _exponents(scales: Tensor) -> Tensor:
    """UE8M0 bytes [..., blocks] of powers of two [..., blocks, 1]."""
    return _bytes(scales.to(torch.float8_e8m0fnu)).squeeze(-1)


def _powers(exponents: Tensor) -> Tensor:
    return _viewed(exponents, torch.float8_e8m0fnu).float()


def _viewed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of packed rows as elements. Copied: it may begin at any byte, and views must be aligned."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
