"""Tiles of stored KV rows, gathered by slot and unpacked in registers: functions for other kernels.

The byte format of packed rows is that of reference/quantize.py. A row that is not wanted reads as zeros and is never
touched, so that what an unwritten one holds, NaN too, cannot get through. In bfloat16 an unpacked row is exact: an e4m3
code has four significant bits, and a power of two as a scale adds none; the least product of a row that was packed is
2^-31.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from thalweg.kernels.arguments import Packing, StoredRows
from thalweg.kernels.reference.quantize import KV_BLOCK
from thalweg.kernels.triton.tiles import INTERPRETED

PLAIN, FP8_KV = 0, 1
WORD = 8  # bytes that a packed row's address is a multiple of: what one load of a thread may take
assert KV_BLOCK == 64  # as a number in _fp8_kv: shapes are no variables there
_FP8_KV = tl.constexpr(FP8_KV)
_WORD = tl.constexpr(WORD)


@dataclass(frozen=True, slots=True)
class RowForm:
    """What a kernel is compiled for: fixed by the model and the format of its cache."""

    form: int
    stride: int  # elements (of a packed row: bytes) from slot to slot
    rope: int

    def constants(self, prefix: str) -> dict[str, int]:
        """As constexprs of a kernel."""
        return {f"{prefix}_FORM": self.form, f"{prefix}_STRIDE": self.stride, f"{prefix}_ROPE": self.rope}


@dataclass(frozen=True, slots=True)
class Placed:
    """Stored rows as a kernel gets them: a pointer, and how many words behind it packed ones begin.

    A layer's packed rows begin at any multiple of 8 bytes. Triton knows of a pointer that it is a multiple of 16 or
    nothing at all, and would then load single bytes; so the pointer is that of the whole pool.
    """

    data: Tensor
    shift: int
    form: RowForm


def placed(stored: StoredRows) -> Placed:
    data = stored.data
    assert data.stride(1) == 1, "elements of a row do not lie side by side"
    if stored.packing is Packing.PLAIN:
        return Placed(data, 0, RowForm(PLAIN, data.stride(0), 0))
    assert stored.packing is Packing.FP8_KV, f"rows packed as {stored.packing} hold no keys and values"
    words, rest = divmod(int(data.storage_offset()), WORD)
    assert rest == 0 and data.stride(0) % WORD == 0, f"packed rows begin at no multiple of {WORD} bytes"
    return Placed(data.as_strided((1,), (1,), 0), words, RowForm(FP8_KV, data.stride(0), stored.rope_dim))


def packed_bytes(width: int, rope: int) -> int:
    """Of one FP8 row."""
    plain = width - rope
    return -(-(plain + 2 * rope + -(-plain // KV_BLOCK)) // WORD) * WORD


@triton.jit
def load_rows(
    rows,
    shift,
    slots,
    there,
    FORM: tl.constexpr,
    STRIDE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[n, PADDED] of DTYPE: rows[slots] (int64 [n]) where `there`, zeros elsewhere and behind WIDTH."""
    if FORM == _FP8_KV:
        tile = _fp8_kv(rows + shift * _WORD, slots, there, STRIDE, ROPE, WIDTH, PADDED, DTYPE)
    else:
        tile = _plain(rows, slots, there, STRIDE, WIDTH, PADDED).to(DTYPE)
    return tile


@triton.jit
def _plain(rows, slots, there, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    return tl.load(rows + slots[:, None] * STRIDE + columns[None, :], mask=_wanted(there, WIDTH, PADDED), other=0.0)


@triton.jit
def over_rows(tile, rows, slots, there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile with plain rows (contiguous) in place of its own where `there`."""
    columns = tl.arange(0, PADDED)
    at = rows + slots[:, None] * WIDTH + columns[None, :]
    if rows.dtype.element_ty == tile.dtype:
        tile = tl.load(at, mask=_wanted(there, WIDTH, PADDED), other=tile)  # into the tile's own registers
    else:
        own = tl.load(at, mask=_wanted(there, WIDTH, PADDED), other=0.0).to(tile.dtype)
        tile = tl.where(there[:, None], own, tile)
    return tile


@triton.jit
def _wanted(there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    wanted = there[:, None]
    if WIDTH != PADDED:
        wanted = wanted & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return wanted


@triton.jit
def _fp8_kv(
    rows,
    slots,
    there,
    STRIDE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    # [n, blocks, lanes], a block being what one scale covers: a scale is then loaded once and not once per element.
    END: tl.constexpr = WIDTH - ROPE
    LANES: tl.constexpr = PADDED if PADDED < 64 else 64
    BLOCKS: tl.constexpr = PADDED // LANES
    block, lane = tl.arange(0, BLOCKS), tl.arange(0, LANES)
    column = block[:, None] * LANES + lane[None, :]
    begin = rows + slots * STRIDE
    wanted = there[:, None, None]
    codes = tl.load(begin[:, None, None] + column[None, :, :], mask=wanted & (column < END)[None, :, :], other=0)
    scaled = there[:, None] & (block * LANES < END)[None, :]
    exponents = tl.load(begin[:, None] + (END + 2 * ROPE) + block[None, :], mask=scaled, other=0)
    if ROPE > 0:
        if END % LANES == 0 and ROPE <= LANES and STRIDE % 2 == 0:
            # The rotated channels are one block: as a tile of that width they are loaded once, then spread.
            at = (begin + END).to(tl.pointer_type(tl.bfloat16))[:, None] + lane[None, :]
            turned = tl.load(at, mask=there[:, None] & (lane < ROPE)[None, :], other=0.0).to(DTYPE)[:, None, :]
        else:
            at, rotated = (
                begin[:, None, None] + (END + 2 * (column - END))[None, :, :],
                (column >= END) & (column < WIDTH),
            )
            low = tl.load(at, mask=wanted & rotated[None, :, :], other=0).to(tl.uint16)
            high = tl.load(at + 1, mask=wanted & rotated[None, :, :], other=0).to(tl.uint16)
            turned = (low | (high << 8)).to(tl.bfloat16, bitcast=True).to(DTYPE)
    # By way of float32: from float16, to which e4m3 is unpacked, straight to bfloat16 is a conversion of a sixteenth of
    # the rate. An exponent's own bits are its power of two; packing gives neither 0 nor 255.
    scales = (exponents.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    values = (codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scales[:, :, None]).to(DTYPE)
    if ROPE > 0:
        if INTERPRETED or values.dtype != tl.bfloat16 or END % LANES != 0:
            values = tl.where((column >= END)[None, :, :], turned, values)
        else:
            # Two values at a time: the compiler would take pairs apart, choose, and join them again.
            taken = tl.where(block * LANES >= END, -1, 0).to(tl.int16)[None, :, None]
            values = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, $2, $3, 0xE4;", "=r,r,r,r", [turned, values, taken], tl.bfloat16, is_pure=True, pack=2
            )
    return tl.reshape(values, [slots.shape[0], PADDED])
