"""How a row is packed into bytes: the served formats and the plain ones. No torch here: planners use it too.

    format     KV row of d elements, r of them rotated                        index key of n elements
    float32    4 d                                                            4 n
    bfloat16   2 d                                                            2 n
    fp8        (d-r) e4m3 + 2 r bf16 + ceil((d-r)/64) UE8M0, padded to 8      n e4m3 + one fp32 scale
    fp4        -                                                              n/2 e2m1 + ceil(n/32) UE8M0

For V4 (d 512, r 64, n 128) that is 584 bytes per KV row and 132 or 68 bytes per index key (mission, "Bytes").
Compressor state is always fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from thalweg.cache.geometry import CacheGroupSpec, RowKind, StreamSpec
from thalweg.errors import ConfigError

_KV_SCALE_BLOCK = 64
_INDEX_SCALE_BLOCK = 32
_ROW_ALIGNMENT = 8


class RowFormat(StrEnum):
    """Storage of KV rows and index keys."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    FP4 = "fp4"


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The formats of one cache. `rope_dim` is the number of rotated elements of a KV row."""

    kv: RowFormat
    index: RowFormat
    rope_dim: int

    def __post_init__(self) -> None:
        if self.kv is RowFormat.FP4:
            raise ConfigError("kv_cache_dtype: KV rows have no fp4 form; use fp8, bfloat16 or float32")

    def row_bytes(self, stream: StreamSpec) -> int:
        """Bytes of one row of a stream in one layer, padding included."""
        width = stream.width
        if stream.kind is RowKind.STATE:
            return 4 * width
        form = self.kv if stream.kind is RowKind.KV else self.index
        if form in (RowFormat.FLOAT32, RowFormat.BFLOAT16):
            return width * (4 if form is RowFormat.FLOAT32 else 2)
        if stream.kind is RowKind.KV:
            plain = width - self.rope_dim
            packed = plain + 2 * self.rope_dim + -(-plain // _KV_SCALE_BLOCK)
            return -(-packed // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        if form is RowFormat.FP8:
            return width + 4
        return width // 2 + -(-width // _INDEX_SCALE_BLOCK)

    def block_bytes(self, spec: CacheGroupSpec) -> int:
        """Bytes of one block of a group: all its streams and layers."""
        return sum(len(s.layers) * s.rows_per_block * self.row_bytes(s) for s in spec.streams)

    def bytes_per_token(self, spec: CacheGroupSpec) -> float:
        """Bytes that one more token of context adds to a compressed group; 0 for a sliding one."""
        return self.block_bytes(spec) / spec.tokens_per_block if spec.compressed else 0.0
