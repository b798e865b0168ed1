"""Decode steps brought to one of few shapes, so that each shape can be captured once as a graph.

What fills a step up is one of its own sequences again, the one with the fewest rows to read, writing nothing: it asks
for the same experts as the original, whose weights are most of what a decode step reads. Windows that a compressor
completes are filled up with ones that pool any rows and are written nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

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
    contexts = [FIRST_CONTEXT]
    while contexts[-1] < max_context:
        contexts.append(contexts[-1] * CONTEXT_FACTOR)
    for power in range((max_sequences - 1).bit_length() + 1):
        size = 1 << power
        of_csa = {_csa_entries(count, size) for count in (0, size)} if csa else {0}
        of_hca = {_hca_entries(count, size) for count in (0, 1, size)} if hca else {0}
        shapes = [(c, h) for c in sorted(of_csa) for h in sorted(of_hca) if c or not h or not together]
        for context in contexts:
            yield from (Bucket(size, c, h, min(context, max_context)) for c, h in shapes)


def _csa_entries(count: int, size: int) -> int:
    return size if count or size > FEW else 0


def _hca_entries(count: int, size: int) -> int:
    return 0 if count == 0 else min(FEW, size) if count <= FEW else size


def padded(step: StepInputs, bucket: Bucket) -> StepInputs:
    """The step in the shape of its bucket. Its first outputs are those of `step`, and so is all that it writes."""
    count, size = len(step.segments), bucket.sequences
    reads = [end - begin for begin, end in zip(step.past_offsets, step.past_offsets[1:], strict=False)]
    for blocks in step.blocks.values():
        reads = [n + blocks.offsets[s + 1] - blocks.offsets[s] for s, n in enumerate(reads)]
    again, more = min(range(count), key=reads.__getitem__), size - count
    starts = step.segments.starts
    segments = Segments(Ints(range(size + 1)), Ints((*starts, *[starts[again]] * more)))
    past_slots, past_offsets = _repeated(step.past_slots, step.past_offsets, again, more)
    return StepInputs(
        token_ids=torch.cat([step.token_ids, step.token_ids[again].expand(more)]),
        positions=torch.cat([step.positions, step.positions[again].expand(more)]),
        segments=segments,
        output_rows=torch.arange(size),
        output_segments=segments,
        past_slots=past_slots,
        past_offsets=past_offsets,
        window_writes=_writes(step.window_writes, size),
        blocks={
            name: BlockLists(*_repeated(blocks.ids, blocks.offsets, again, more), blocks.rows_per_block)
            for name, blocks in step.blocks.items()
        },
        csa=None if step.csa is None else _compressor(step.csa, size, bucket.csa),
        hca=None if step.hca is None else _compressor(step.hca, size, bucket.hca),
    )


def _repeated(values: Tensor, offsets: Ints, sequence: int, times: int) -> tuple[Tensor, Ints]:
    """Lists one after another, and one of them so often again."""
    own = values[offsets[sequence] : offsets[sequence + 1]]
    ends = (offsets[-1] + len(own) * (i + 1) for i in range(times))
    return torch.cat([values, own.repeat(times)]), Ints((*offsets, *ends))


def _writes(writes: RowWrites, size: int) -> RowWrites:
    """Every row of the batch, those that were not to be written with no slot."""
    slots = torch.full((size,), -1)
    slots[writes.source] = writes.slots
    return RowWrites(torch.arange(size), slots)


def _compressor(inputs: CompressorInputs, size: int, entries: int) -> CompressorInputs:
    m, more = inputs.ratio, entries - len(inputs.positions)
    pending, own = _gather(inputs.pending_slots, inputs.own, entries * (m - 1), more)
    whole = CompressorInputs(
        ratio=m,
        pending_slots=pending,
        own=own,
        positions=F.pad(inputs.positions, (0, more)),
        entries={name: F.pad(slots, (0, more), value=-1) for name, slots in inputs.entries.items()},
        pending_writes=_writes(inputs.pending_writes, size),
    )
    if inputs.tail_slots is None or inputs.previous is None or inputs.tail_writes is None:
        return whole
    tail, previous = _gather(inputs.tail_slots, inputs.previous, entries * m, more)
    return replace(whole, tail_slots=tail, previous=previous, tail_writes=_writes(inputs.tail_writes, size))


def _gather(slots: Tensor, places: Tensor, room: int, more: int) -> tuple[Tensor, Tensor]:
    """`places` index cat(rows read from slots, new rows): the new rows move back by what is added to the slots."""
    added = room - len(slots)
    moved = torch.where(places >= len(slots), places + added, places)
    return F.pad(slots, (0, added)), F.pad(moved, (0, 0, 0, more))
