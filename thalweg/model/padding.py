"""Decode steps brought to one of few shapes, so that each shape can be captured once as a graph.

What fills a step up is one of its own sequences again, the one with the fewest rows to read, writing nothing: it asks
for the same experts as the original, whose weights are most of what a decode step reads. Windows that a compressor
completes are filled up with ones that pool any rows and are written nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thalweg.config.model import LayerKind, ModelConfig
from thalweg.kernels.arguments import Ints, Segments
from thalweg.model.inputs import BlockLists, CompressorInputs, RowWrites, StepInputs

FEW = 16  # sequences that may all complete an entry in a step; of more, so many often do and seldom more
FIRST_CONTEXT, CONTEXT_FACTOR = 8192, 4  # contexts between two of these run in the grids of the longer one


@dataclass(frozen=True, slots=True)
class Bucket:
    """One shape: sequences of one new token each, entries that they complete by compressor, and the tokens that none of
    their contexts exceeds."""

    sequences: int
    csa: int
    hca: int
    context: int


def bucket_of(step: StepInputs, max_context: int) -> Bucket | None:
    """The smallest that holds a step; None for one that is no decode step: one new token and one output each."""
    count = len(step.segments)
    if not len(step.token_ids) == len(step.output_rows) == count > 0:
        return None
    size = 1 << (count - 1).bit_length()
    csa, hca = (0 if inputs is None else len(inputs.positions) for inputs in (step.csa, step.hca))
    context = FIRST_CONTEXT
    while context <= max(step.segments.starts):
        context *= CONTEXT_FACTOR
    if step.csa is not None:
        csa = _csa_entries(csa, size)
    return Bucket(size, csa, _hca_entries(hca, size), min(context, max_context))


def buckets(config: ModelConfig, max_sequences: int, max_context: int) -> Iterator[Bucket]:
    """Every bucket that steps within these limits can fall into."""
    csa, hca = (bool(config.layers_of(kind)) for kind in (LayerKind.CSA, LayerKind.HCA))
    together = csa and config.hca_ratio % config.csa_ratio == 0  # whoever completes an HCA entry completes a CSA entry
    for power in range((max_sequences - 1).bit_length() + 1):
        size = 1 << power
        of_csa = {_csa_entries(count, size) for count in (0, size)} if csa else {0}
        of_hca = {_hca_entries(count, size) for count in (0, 1, size)} if hca else {0}
        shapes = [(c, h) for c in sorted(of_csa) for h in sorted(of_hca) if c or not h or not together]
        for context in contexts(max_context):
            yield from (Bucket(size, c, h, context) for c, h in shapes)


def contexts(most: int) -> list[int]:
    """The contexts of buckets, up to `most`."""
    found = [FIRST_CONTEXT]
    while found[-1] < most:
        found.append(found[-1] * CONTEXT_FACTOR)
    return [*found[:-1], most]


def _csa_entries(count: int, size: int) -> int:
    return size if count or size > FEW else 0


def _hca_entries(count: int, size: int) -> int:
    return 0 if count == 0 else min(FEW, size) if count <= FEW else size


def padded(step: StepInputs, bucket: Bucket) -> StepInputs:
    """A step in the host's memory, in the shape of its bucket. Its first outputs are those of `step`, and so are all
    rows that it writes."""
    count, size = len(step.segments), bucket.sequences
    again, more = _shortest(step), size - count
    starts, rows = step.segments.starts, torch.from_numpy(np.arange(size))
    segments = Segments(Ints(range(size + 1)), Ints((*starts, *[starts[again]] * more)))
    past_slots, past_offsets = _repeated(step.past_slots, step.past_offsets, again, more)
    return StepInputs(
        token_ids=_filled(step.token_ids, more, again),
        positions=_filled(step.positions, more, again),
        segments=segments,
        output_rows=rows,
        output_segments=segments,
        past_slots=past_slots,
        past_offsets=past_offsets,
        window_writes=_writes(step.window_writes, rows),
        blocks={
            name: BlockLists(*_repeated(blocks.ids, blocks.offsets, again, more), blocks.rows_per_block)
            for name, blocks in step.blocks.items()
        },
        csa=None if step.csa is None else _compressor(step.csa, rows, bucket.csa),
        hca=None if step.hca is None else _compressor(step.hca, rows, bucket.hca),
    )


def _shortest(step: StepInputs) -> int:
    """The sequence that reads the fewest rows: of all compressed streams those of the first one tell."""
    starts = step.segments.starts
    return starts.index(min(starts))


# Arrays of numpy, not tensors: each operation on a few numbers takes a fifth of the time, and there are fifty of them.


def _filled(values: Tensor, more: int, place: int) -> Tensor:
    """So many more, each a copy of the one at `place`."""
    if not more:
        return values
    own = values.numpy()
    return torch.from_numpy(np.concatenate([own, np.repeat(own[place], more)]))


def _longer(values: Tensor, more: int, filling: int = 0) -> Tensor:
    """Rows added at the end."""
    if not more:
        return values
    own = values.numpy()
    return torch.from_numpy(np.concatenate([own, np.full((more, *own.shape[1:]), filling)]))


def _repeated(values: Tensor, offsets: Ints, sequence: int, times: int) -> tuple[Tensor, Ints]:
    """Lists one after another, and one of them so often again."""
    if not times:
        return values, offsets
    whole = values.numpy()
    own = whole[offsets[sequence] : offsets[sequence + 1]]
    ends = (offsets[-1] + len(own) * (i + 1) for i in range(times))
    return torch.from_numpy(np.concatenate([whole, np.tile(own, times)])), Ints((*offsets, *ends))


def _writes(writes: RowWrites, rows: Tensor) -> RowWrites:
    """Every row of the batch, those that were not to be written with no slot."""
    if len(writes.slots) == len(rows):
        return writes
    slots = np.full(len(rows), -1)
    slots[writes.source.numpy()] = writes.slots.numpy()
    return RowWrites(rows, torch.from_numpy(slots))


def _compressor(inputs: CompressorInputs, rows: Tensor, entries: int) -> CompressorInputs:
    m, more = inputs.ratio, entries - len(inputs.positions)
    pending, own = _gather(inputs.pending_slots, inputs.own, entries * (m - 1), more)
    tail, previous, tail_writes = inputs.tail_slots, inputs.previous, inputs.tail_writes
    if tail is not None and previous is not None and tail_writes is not None:
        tail, previous = _gather(tail, previous, entries * (2 * m - 1), more)  # up to the window's own last token
        tail_writes = _writes(tail_writes, rows)
    return CompressorInputs(
        ratio=m,
        pending_slots=pending,
        own=own,
        positions=_longer(inputs.positions, more),
        entries={name: _longer(slots, more, -1) for name, slots in inputs.entries.items()},
        pending_writes=_writes(inputs.pending_writes, rows),
        tail_slots=tail,
        previous=previous,
        tail_writes=tail_writes,
    )


def _gather(slots: Tensor, places: Tensor, room: int, more: int) -> tuple[Tensor, Tensor]:
    """`places` index cat(rows read from slots, new rows): the new rows move back by what is added to the slots."""
    added, own = room - len(slots), places.numpy()
    assert added >= 0, "a window of a decode step needs fewer rows than it has tokens"
    moved = torch.from_numpy(np.where(own >= len(slots), own + added, own)) if added and own.size else places
    return _longer(slots, added), _longer(moved, more)
