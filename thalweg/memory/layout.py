"""How a row is packed into bytes: the served formats and the plain ones. No torch here: planners use it too.

    format     KV row of d elements, r of them rotated                        index key of n elements
    float32    4 d                                                            4 n
    bfloat16   2 d                                                            2 n
    fp8        (d-r) e4m3 + 2 r bf16 + ceil((d-r)/64) UE8M0, padded to 8      n e4m3 + one fp32 scale
    fp4        -                                                              n/2 e2m1 + ceil(n/32) UE8M0

For V4 (d 512, r 64, n 128) that is 584 bytes per KV row, one of them padding, and 132 or 68 bytes per index key.
Compressor state is always fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from thalweg.cache.geometry import CacheGroupSpec, RowKind, StreamSpec
from thalweg.errors import ConfigError

# Of the bytes of a block, and of the order of groups, streams and layers in a stored unit or checkpoint (packing.py).
# Part of every namespace: raise it with any change to those, and records of other builds are never taken for our own.
LAYOUT_VERSION = 1
_KV_SCALE_BLOCK = 64
_INDEX_SCALE_BLOCK = 32
_ROW_ALIGNMENT = 8


class RowFormat(StrEnum):
    """Storage of KV rows and index keys."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    FP4 = "fp4"

    @property
    def packed(self) -> bool:
        """True where a row is bytes, not elements of one dtype."""
        return self in (RowFormat.FP8, RowFormat.FP4)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The formats of one cache. `rope_dim` is the number of rotated elements of a KV row."""

    kv: RowFormat
    index: RowFormat
    rope_dim: int

    def __post_init__(self) -> None:
        if self.kv is RowFormat.FP4:
            raise ConfigError("kv_cache_dtype: KV rows have no fp4 form; use fp8, bfloat16 or float32")

    def format_of(self, stream: StreamSpec) -> RowFormat:
        """The format of a stream's rows."""
        if stream.kind is RowKind.STATE:
            return RowFormat.FLOAT32
        return self.kv if stream.kind is RowKind.KV else self.index

    def row_bytes(self, stream: StreamSpec) -> int:
        """Bytes of one row of a stream in one layer, padding included."""
        return self._data_bytes(stream) + self.padding_bytes(stream)

    def padding_bytes(self, stream: StreamSpec) -> int:
        """Bytes of `row_bytes` that hold nothing."""
        packed_kv = stream.kind is RowKind.KV and self.kv is RowFormat.FP8
        return -self._data_bytes(stream) % _ROW_ALIGNMENT if packed_kv else 0

    def _data_bytes(self, stream: StreamSpec) -> int:
        form, width = self.format_of(stream), stream.width
        if not form.packed:
            return width * (4 if form is RowFormat.FLOAT32 else 2)
        if stream.kind is RowKind.KV:
            plain = width - self.rope_dim
            return plain + 2 * self.rope_dim + -(-plain // _KV_SCALE_BLOCK)
        return width + 4 if form is RowFormat.FP8 else width // 2 + -(-width // _INDEX_SCALE_BLOCK)

    def block_bytes(self, spec: CacheGroupSpec) -> int:
        """Bytes of one block of a group: all its streams and layers."""
        return sum(len(s.layers) * s.rows_per_block * self.row_bytes(s) for s in spec.streams)

    def bytes_per_token(self, spec: CacheGroupSpec) -> float:
        """Bytes that one more token of context adds to a compressed group; 0 for a sliding one."""
        return self.block_bytes(spec) / spec.tokens_per_block if spec.compressed else 0.0
