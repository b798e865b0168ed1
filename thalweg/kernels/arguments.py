"""Values that the ops take beside plain tensors: which rows belong to which sequence, and where cached rows lie."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

import torch
from torch import Tensor


class Ints(tuple[int, ...]):
    """Whole numbers that Python loops over and compiled kernels read, as int64 at `address`: in the host's memory,
    unless they are held by a tensor of another device."""

    memory: array[int] | Tensor
    address: int
    copies: dict[torch.device, Tensor]

    def __new__(cls, values: Iterable[int]) -> Ints:
        """`values` themselves if they are Ints already."""
        if type(values) is cls:
            return values
        made = super().__new__(cls, values)
        memory = array("q", made)
        made.memory, made.address = memory, memory.buffer_info()[0]
        made.copies = {}
        return made

    @classmethod
    def held(cls, numbers: Tensor, bounds: Iterable[int]) -> Ints:
        """Numbers that change where they lie, in an int64 tensor: kernels read them there, and Python knows no more
        than what they never exceed."""
        made = cls(bounds)
        made.memory, made.address = numbers, numbers.data_ptr()
        made.copies = {numbers.device: numbers}
        return made

    def on(self, device: torch.device) -> Tensor:
        """int64 on a device. Copied once, however many layers ask."""
        if device not in self.copies:
            host = torch.frombuffer(self.memory, dtype=torch.int64) if self else torch.empty(0, dtype=torch.int64)
            self.copies[device] = host.to(device, non_blocking=True)
        return self.copies[device]

    @classmethod
    def offsets(cls, counts: Iterable[int]) -> Ints:
        """Where each of several lists of these lengths begins in all of them joined, and where the last one ends."""
        return cls(accumulate(counts, initial=0))


@dataclass(frozen=True, slots=True)
class Segments:
    """Sequences in a flat batch: s owns rows offsets[s] to offsets[s+1]; the first of them is at position starts[s]."""

    offsets: Ints
    starts: Ints

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", Ints(self.offsets))
        object.__setattr__(self, "starts", Ints(self.starts))

    def __len__(self) -> int:
        return len(self.starts)


FP8_BLOCK = 128  # rows and columns under one scale
FP4_GROUP = 32  # columns of a row under one scale


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [N, K], or several [G, N, K], in the bytes of a checkpoint (model-spec 5). FP8: `data` e4m3 [..., N, K],
    `scales` uint8 [..., ceil(N/128), ceil(K/128)]. FP4: `data` uint8 [..., N, K/2], two e2m1 to a byte, the even column
    in its low half, `scales` uint8 [..., N, K/32]. A scale is 2^(byte - 127)."""

    data: Tensor
    scales: Tensor

    @property
    def outputs(self) -> int:
        return self.data.shape[-2]

    @property
    def width(self) -> int:
        return self.data.shape[-1] * (2 if self.data.dtype is torch.uint8 else 1)

    def unflatten(self, dim: int, sizes: tuple[int, int]) -> Quantised:
        """As a tensor's: rows in groups, which in FP8 are whole blocks."""
        return Quantised(self.data.unflatten(dim, sizes), self.scales.unflatten(dim, sizes))


Matrix = Tensor | Quantised


def joined(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of one form, one after another along the first axis: in FP8 all but the last are whole blocks."""
    data = torch.cat([part if isinstance(part, Tensor) else part.data for part in parts])
    scales = [part.scales for part in parts if isinstance(part, Quantised)]
    return Quantised(data, torch.cat(scales)) if scales else data


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [outputs, width], or several of them one after another [groups, outputs, width], as Kernels.pack made
    it: `data` and `scales` are in the form that its backend alone reads. Every other op that takes one names its
    logical shape."""

    data: Tensor
    outputs: int
    width: int
    scales: Tensor | None = None


class Packing(StrEnum):
    """Byte formats of stored rows; kernels/reference/quantize.py packs them."""

    PLAIN = "plain"  # elements of a float dtype
    FP8_KV = "fp8_kv"  # e4m3, the rotated channels bf16, a power-of-two scale per 64
    FP8_INDEX = "fp8_index"  # e4m3, one fp32 scale
    FP4_INDEX = "fp4_index"  # e2m1 of Hadamard-rotated keys, a power-of-two scale per 32


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows as they lie in the cache: `data` [slots, width] of a float dtype if plain, else uint8 [slots, bytes of a
    row]. `width` is in elements; the last `rope_dim` of them are the rotated channels of a KV row (0 elsewhere)."""

    data: Tensor
    packing: Packing
    width: int
    rope_dim: int = 0


class RowRounding(StrEnum):
    """To which values rows are rounded before they are stored, in whatever format."""

    NONE = "none"
    KV = "kv"  # as ops.RoundKv
    INDEX = "index"  # as ops.RoundIndex, rotation included
    INDEX_FP8 = "index_fp8"  # as ops.RoundIndexFp8


def plain_rows(data: Tensor) -> StoredRows:
    """Rows [slots, width] of a float dtype."""
    return StoredRows(data, Packing.PLAIN, data.shape[-1])


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Cached rows of one stream and layer. Sequence s has the blocks
    blocks[offsets[s]:offsets[s+1]] (int64), in token order; block b holds slots b*rows_per_block onwards."""

    rows: StoredRows
    blocks: Tensor
    offsets: Ints
    rows_per_block: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", Ints(self.offsets))


@dataclass(frozen=True, slots=True)
class PastRows:
    """Cached rows by slot: sequence s reads rows[slots[offsets[s]:offsets[s+1]]], oldest first (slots int64)."""

    rows: StoredRows
    slots: Tensor
    offsets: Ints

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", Ints(self.offsets))


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the queries of a layer may see. `queries` and `keys` list the same sequences: the rows with queries, and all
    new rows; `past` are the window rows from before the step; `entries` the layer's compressed rows, one per `ratio`
    tokens, None in a window layer. A query at position t sees window rows t-window+1 to t, entries below (t+1)//ratio.
    """

    queries: Segments
    keys: Segments
    past: PastRows
    entries: PagedRows | None
    ratio: int
    window: int


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of tokens as if they lay one after another: those in `slots` (int64) of a plain cache stream, then `new`."""

    cached: Tensor
    slots: Tensor
    new: Tensor

    def joined(self) -> Tensor:
        return torch.cat([self.cached[self.slots], self.new])


@dataclass(frozen=True, slots=True)
class Windows:
    """The tokens that each of E entries pools: own int64 [E, m] of `rows` and, where windows overlap, previous [E, m]
    of `rows_before` (-1: none). Rows are fp32 [tokens, 2*dim], value then gate."""

    rows: TokenRows
    own: Tensor
    rows_before: TokenRows | None = None
    previous: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EntryTarget:
    """Where entries go, slots int64 [E] (below 0: nowhere), and to which values they are rounded on the way."""

    stored: StoredRows
    slots: Tensor
    rounding: RowRounding
