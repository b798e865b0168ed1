"""Attention over window, compressed entries and sink: one program per query, group of heads and run of chunks.

The keys of a query are a list: its window, oldest first, then its entries (all visible ones, or the selected ones as
given). The window is chunk 0; entries make chunks of a fixed length from their first on. Within a chunk the softmax is
accumulated tile by tile from nothing; chunks are then folded into a total that starts from the sink, in their order.

A few queries (decoding) have one program per chunk: each writes its part to a workspace, and a second kernel folds.
Many queries (prefill) have one program for all chunks, which folds into the result's own row after each: parts of all
of them would be several times the bytes of the entries. Both compute the same chunks by the very same compiled kernel
and fold them by the same explicit multiply-adds, so which of the two it was cannot be seen in the result. Nor can
anything else: list, tiles and chunks follow from the query's own position, and heads and queries never meet in a sum.
That is why a row's bits do not depend on its company.

The workspace is a fixed number of parts, however long the context; queries take turns in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import AttentionContext
from thalweg.kernels.triton.attend import ALL, LOG2_E, SELECTED, WINDOW, attend, fold
from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.stored import FP8_KV, PLAIN, RowForm, packed_bytes, placed

# Entries per chunk. Long chunks cost decoding parallelism, short ones cost prefill a fold each: 256 KiB through the L2
# cache, some 2 us of a multiprocessor, where 64 entries take about as long.
CHUNK = {WINDOW: 256, SELECTED: 256, ALL: 512}
TILE_ELEMENTS = 1 << 14  # of a tile of rows: 32 rows of 512; a larger one exceeds B200's shared memory
MOST_TILE_ROWS = 128
MOST_HEADS = 64  # of a program: the least that Hopper's and Blackwell's tensor cores take, and 64 x 512 fp32 fill TMEM
MOST_HEADS_FP32 = 16  # without tensor cores: what registers hold
PARTS = 512  # of the workspace: 64 MiB at 64 heads x 512
WALKING_PROGRAMS = 128  # from here on whole queries fill the multiprocessors (132 of an H100, 148 of a B200)
FOLDED_AT_ONCE = 8  # parts whose loads are under way together
FOLD_WARPS = 4

_OFFSETS = ("query_offsets", "query_starts", "key_offsets", "key_starts", "past_offsets", "entry_offsets")


@dataclass(frozen=True, slots=True)
class Shape:
    """Tiles of a layer: the same for every query that it will ever have."""

    mode: int
    heads: int
    width: int
    window: int
    ratio: int
    block_rows: int
    past: RowForm
    entry: RowForm
    narrow: bool  # bfloat16 queries

    @property
    def heads_at_once(self) -> int:
        most = MOST_HEADS if self.narrow else MOST_HEADS_FP32
        return min(most, max(16, triton.next_power_of_2(self.heads)))

    @property
    def groups(self) -> int:
        return -(-self.heads // self.heads_at_once)

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.width))

    @property
    def tile(self) -> int:
        return max(16, min(MOST_TILE_ROWS, TILE_ELEMENTS // self.padded))

    def chunks(self, entries: int) -> int:
        """Of a query that has so many entries in its list."""
        return 1 + -(-entries // CHUNK[self.mode])

    def attend_constants(self) -> dict[str, int]:
        return {
            "MODE": self.mode,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "WINDOW_ROWS": self.window,
            "RATIO": self.ratio,
            "BLOCK_ROWS": self.block_rows,
            **self.past.constants("PAST"),
            **self.entry.constants("ENTRY"),
            "HEADS_AT_ONCE": self.heads_at_once,
            "PADDED": self.padded,
            "TILE": self.tile,
            "CHUNK": CHUNK[self.mode],
        }

    def fold_constants(self) -> dict[str, int]:
        return {
            "HEADS": self.heads,
            "WIDTH": self.width,
            "HEADS_AT_ONCE": self.heads_at_once,
            "PADDED": self.padded,
            "AT_ONCE": FOLDED_AT_ONCE,
        }

    def options(self) -> dict[str, int]:
        """8 warps hold 64 x 512 accumulators in 128 registers each."""
        wide = self.heads_at_once * self.padded >= 1 << 14
        return {"num_warps": 8 if wide else 4, "num_stages": 2}


def attention(
    query: Tensor, new_rows: Tensor, context: AttentionContext, sinks: Tensor, selected: Tensor | None
) -> Tensor:
    query, new_rows, sinks = query.contiguous(), new_rows.contiguous(), sinks.contiguous()
    queries, heads, width = query.shape
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    if queries == 0:
        return out
    past = placed(context.past.rows)
    entry = past if context.entries is None else placed(context.entries.rows)
    shape = _shape(query, context, past.form, entry.form, selected is not None)
    most = shape.chunks(_longest(context, selected))
    per_query = most * shape.groups
    walks = most == 1 or queries * shape.groups >= WALKING_PROGRAMS or per_query > PARTS
    space = _workspace(shape, out) if not walks else (out, out, out)
    step = queries if walks else PARTS // per_query
    for first in range(0, queries, step):
        rows = min(step, queries - first)
        attend[(rows * shape.groups, 1 if walks else most)](
            query, new_rows, sinks, out, past.data, past.shift, context.past.slots, entry.data, entry.shift,
            *_lists(context, selected), *_segments(context), *space,
            len(context.queries), first, 0 if selected is None else selected.shape[1], most, most if walks else 1,
            width**-0.5 * LOG2_E, **shape.attend_constants(), **shape.options(),
        )  # fmt: skip
        if not walks:
            fold[(rows, heads)](sinks, out, *space, first, most, **shape.fold_constants(), num_warps=FOLD_WARPS)
    return out


def _shape(query: Tensor, context: AttentionContext, past: RowForm, entry: RowForm, selects: bool) -> Shape:
    entries = context.entries
    return Shape(
        mode=WINDOW if entries is None else SELECTED if selects else ALL,
        heads=query.shape[1],
        width=query.shape[2],
        window=context.window,
        ratio=context.ratio,
        block_rows=1 if entries is None else entries.rows_per_block,
        past=past,
        entry=entry,
        narrow=query.dtype is torch.bfloat16,
    )


def _longest(context: AttentionContext, selected: Tensor | None) -> int:
    """Entries in the longest list of a query."""
    if context.entries is None:
        return 0
    if selected is not None:
        return selected.shape[1]
    starts, offsets = context.queries.starts, context.queries.offsets
    return max((start + offsets[s + 1] - offsets[s]) // context.ratio for s, start in enumerate(starts))


def _lists(context: AttentionContext, selected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blocks and selected entries; where there are none, something that is not read."""
    blocks = context.past.slots if context.entries is None else context.entries.blocks
    return blocks, blocks if selected is None else selected.contiguous()


def _segments(context: AttentionContext) -> Iterator[Tensor]:
    queries, keys, past = context.queries, context.keys, context.past.offsets
    entries = past if context.entries is None else context.entries.offsets
    device = context.past.slots.device
    return (x.on(device) for x in (queries.offsets, queries.starts, keys.offsets, keys.starts, past, entries))


def _workspace(shape: Shape, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As large for a short context as for a long one: what a step takes does not grow with what came before."""
    return (
        like.new_empty(PARTS, shape.heads_at_once, shape.padded),
        like.new_empty(PARTS, 2, shape.heads_at_once),
        like.new_empty(PARTS, dtype=torch.int32),
    )


def launches(config: ModelConfig) -> list[Launch]:
    """Decoding and prefill run the same `attend`; `fold` is what decoding adds."""
    made = []
    width = config.head_dim
    for name, form, rows in (
        ("bfloat16", RowForm(PLAIN, width, 0), "*bf16"),
        ("fp8", RowForm(FP8_KV, packed_bytes(width, config.rope_dim), config.rope_dim), "*u8"),
    ):
        for mode, what, ratio in (
            (WINDOW, "window alone", 0),
            (SELECTED, "window and selected entries", config.csa_ratio),
            (ALL, "window and all entries", config.hca_ratio),
        ):
            block = config.unit_tokens // ratio if ratio else 1
            heads = config.num_attention_heads
            shape = Shape(mode, heads, width, config.window, ratio, block, form, form, True)
            constants, options = shape.attend_constants(), shape.options()
            what = f"{what}, {name} rows"
            made.append(
                Launch("attention", what, attend, _types(attend, constants, rows), constants, options, matrix=True)
            )
    constants, options = shape.fold_constants(), {"num_warps": FOLD_WARPS}
    made.append(Launch("attention", "parts folded", fold, _types(fold, constants, "*u8"), constants, options))
    return made


def _types(kernel: Any, constants: dict[str, int], rows: str) -> dict[str, str]:
    """Of all arguments that are no constexprs; what is not named here is an int32."""
    known = dict.fromkeys(("past_slots", "blocks", "selected", *_OFFSETS), "*i64")
    known |= dict.fromkeys(("sinks", "out", "parts", "summaries"), "*fp32")
    known |= {"query": "*bf16", "new_rows": "*bf16", "past_rows": rows, "entry_rows": rows}
    known |= {"counts": "*i32", "scale": "fp32"}
    return {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}
