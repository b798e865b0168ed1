"""An independent, plain builder of StepInputs: every token's place by loops, blocks shuffled and never reused.

It shares no line with the engine's builder, so that each checks the other.
"""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import Tensor

from thalweg.cache.geometry import StreamSpec, cache_groups
from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Ints, Segments
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.inputs import BlockLists, CompressorInputs, RowWrites, StepInputs


class PagedSequences:
    """Rows of several sequences in shuffled blocks, with room for `most_tokens` each. Nothing is ever freed."""

    def __init__(
        self, config: ModelConfig, sequences: int, most_tokens: int, layout: CacheLayout | None = None
    ) -> None:
        self.config = config
        layout = layout or CacheLayout(RowFormat.FLOAT32, RowFormat.FLOAT32, config.rope_dim)
        self._streams = {s.name: (spec, s) for spec in cache_groups(config) for s in spec.streams}
        self._blocks: dict[str, list[list[int]]] = {}
        self._rows: dict[tuple[str, int], Tensor] = {}
        shuffle = random.Random(5).shuffle
        for spec in cache_groups(config):
            each = -(-most_tokens // spec.tokens_per_block)
            ids = list(range(sequences * each))
            shuffle(ids)
            self._blocks[spec.group.value] = [ids[i * each : (i + 1) * each] for i in range(sequences)]
            for stream in spec.streams:
                slots = sequences * each * stream.rows_per_block
                for layer in stream.layers:
                    self._rows[stream.name, layer] = _unwritten(slots, stream.width, stream, layout)

    def rows(self, stream: str, layer: int) -> Tensor:
        return self._rows[stream, layer]

    def slot(self, stream: str, sequence: int, position: int) -> int:
        spec, shape = self._streams[stream]
        block = self._blocks[spec.group.value][sequence][position // spec.tokens_per_block]
        return block * shape.rows_per_block + position // shape.tokens_per_row % shape.rows_per_block

    def inputs(self, pieces: list[tuple[int, int, list[int]]], outputs: list[int] | None = None) -> StepInputs:
        """One step: (sequence, first position, tokens) each; `outputs` are batch rows, all of them by default."""
        offsets, past_offsets = [0], [0]
        tokens, positions, past, window = [], [], [], ([], [])
        for sequence, start, ids in pieces:
            for position in range(max(0, start - self.config.window + 1), start):
                past.append(self.slot("window", sequence, position))
            for i, token in enumerate(ids):
                window[0].append(len(tokens))
                window[1].append(self.slot("window", sequence, start + i))
                tokens.append(token)
                positions.append(start + i)
            offsets.append(len(tokens))
            past_offsets.append(len(past))
        chosen = list(range(len(tokens))) if outputs is None else outputs
        counts = [sum(a <= row < b for row in chosen) for a, b in pairwise(offsets)]
        ends = [start + len(ids) for _, start, ids in pieces]
        return StepInputs(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            segments=Segments(tuple(offsets), tuple(start for _, start, _ in pieces)),
            output_rows=torch.tensor(chosen, dtype=torch.int64),
            output_segments=Segments(_sums(counts), tuple(e - n for e, n in zip(ends, counts, strict=True))),
            past_slots=torch.tensor(past, dtype=torch.int64),
            past_offsets=Ints(past_offsets),
            window_writes=RowWrites(torch.tensor(window[0]), torch.tensor(window[1])),
            blocks={n: self._lists(n, pieces) for n in ("csa", "index", "hca") if n in self._streams},
            csa=self._compressor(pieces, self.config.csa_ratio, "csa") if "csa" in self._streams else None,
            hca=self._compressor(pieces, self.config.hca_ratio, "hca") if "hca" in self._streams else None,
        )

    def _lists(self, name: str, pieces: list[tuple[int, int, list[int]]]) -> BlockLists:
        spec, stream = self._streams[name]
        used = [
            self._blocks[spec.group.value][s][: -(-(start + len(ids)) // spec.tokens_per_block)]
            for s, start, ids in pieces
        ]
        flat = torch.tensor([block for blocks in used for block in blocks], dtype=torch.int64)
        return BlockLists(flat, Ints(_sums([len(blocks) for blocks in used])), stream.rows_per_block)

    def _compressor(self, pieces: list[tuple[int, int, list[int]]], m: int, kind: str) -> CompressorInputs:
        names = ("csa", "index") if kind == "csa" else ("hca",)
        pending: list[int] = []
        tail: list[int] = []
        places: dict[tuple[str, int, int], int] = {}  # (source, sequence, position) -> row
        writes: dict[str, tuple[list[int], list[int]]] = {"pending": ([], []), "tail": ([], [])}
        new_rows: dict[tuple[int, int], int] = {}
        closed: list[tuple[int, int]] = []
        for sequence, start, ids in pieces:
            closes = (start + len(ids)) // m > start // m
            for position in range(start // m * m, start) if closes else ():
                places["own", sequence, position] = len(pending)
                pending.append(self.slot(f"pending_{kind}", sequence, position))
            for position in range(max(0, start // m * m - m), start) if closes and kind == "csa" else ():
                places["before", sequence, position] = len(tail)
                tail.append(self.slot("tail_csa", sequence, position))
            end = start + len(ids)
            for position in range(start, end):
                row = new_rows[sequence, position] = len(new_rows)
                if position >= end // m * m:
                    writes["pending"][0].append(row)
                    writes["pending"][1].append(self.slot(f"pending_{kind}", sequence, position))
                if kind == "csa":
                    writes["tail"][0].append(row)
                    writes["tail"][1].append(self.slot("tail_csa", sequence, position))
                if (position + 1) % m == 0:
                    closed.append((sequence, position + 1 - m))

        def place(source: str, old: list[int], sequence: int, position: int) -> int:
            if position < 0:
                return -1
            if (sequence, position) in new_rows:
                return len(old) + new_rows[sequence, position]
            return places[source, sequence, position]

        own = [[place("own", pending, s, p + i) for i in range(m)] for s, p in closed]
        overlapping = closed if kind == "csa" else []
        before = [[place("before", tail, s, p - m + i) for i in range(m)] for s, p in overlapping]
        shape = (len(closed), m)
        return CompressorInputs(
            ratio=m,
            pending_slots=torch.tensor(pending, dtype=torch.int64),
            own=torch.tensor(own, dtype=torch.int64).view(shape),
            positions=torch.tensor([p for _, p in closed], dtype=torch.int64),
            entries={n: torch.tensor([self.slot(n, s, p) for s, p in closed], dtype=torch.int64) for n in names},
            pending_writes=_writes(writes["pending"]),
            tail_slots=torch.tensor(tail, dtype=torch.int64) if kind == "csa" else None,
            previous=torch.tensor(before, dtype=torch.int64).view(shape) if kind == "csa" else None,
            tail_writes=_writes(writes["tail"]) if kind == "csa" else None,
        )


def _unwritten(slots: int, width: int, stream: StreamSpec, layout: CacheLayout) -> Tensor:
    """Rows that read as NaN."""
    form = layout.format_of(stream)
    if form.packed:
        return torch.full((slots, layout.row_bytes(stream)), 255, dtype=torch.uint8)
    return torch.full((slots, width), float("nan"), dtype=getattr(torch, form.value))


def _writes(pair: tuple[list[int], list[int]]) -> RowWrites:
    return RowWrites(torch.tensor(pair[0], dtype=torch.int64), torch.tensor(pair[1], dtype=torch.int64))


def _sums(counts: list[int]) -> tuple[int, ...]:
    return tuple(sum(counts[:i]) for i in range(len(counts) + 1))
