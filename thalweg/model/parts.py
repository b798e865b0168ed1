"""A step taken apart into its tensors and numbers and put together again: to note it, to carry it to a device, or to
copy it over the step that a graph was captured with. The order is the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from thalweg.kernels.arguments import Ints, Segments
from thalweg.model.inputs import BlockLists, CompressorInputs, RowWrites, StepInputs

_FILLING = torch.zeros(1, dtype=torch.int64)


def sized(step: StepInputs) -> list[Tensor]:
    """Tensors whose sizes Python sees as it computes the step."""
    tensors = [step.token_ids, step.positions, step.output_rows, step.window_writes.source, step.window_writes.slots]
    for inputs in (step.csa, step.hca):
        tensors += [] if inputs is None else _of_compressor(inputs)
    return tensors


def ragged(step: StepInputs) -> list[Tensor]:
    """Tensors of any length: only kernels look into them, and find the lengths in `ints`."""
    return [step.past_slots, *(blocks.ids for blocks in step.blocks.values())]


def ints(step: StepInputs) -> list[Ints]:
    segments = [numbers for own in (step.segments, step.output_segments) for numbers in (own.offsets, own.starts)]
    return [*segments, step.past_offsets, *(blocks.offsets for blocks in step.blocks.values())]


def rebuilt(
    step: StepInputs, of_size: Iterable[Tensor], of_any_length: Iterable[Tensor], numbers: Iterable[Ints]
) -> StepInputs:
    """A step of the same form from other parts, each kind in the order of its function above."""
    tensors, others, counts = iter(of_size), iter(of_any_length), iter(numbers)
    return StepInputs(
        token_ids=next(tensors),
        positions=next(tensors),
        output_rows=next(tensors),
        window_writes=RowWrites(next(tensors), next(tensors)),
        csa=_compressor(step.csa, tensors),
        hca=_compressor(step.hca, tensors),
        segments=Segments(next(counts), next(counts)),
        output_segments=Segments(next(counts), next(counts)),
        past_slots=next(others),
        past_offsets=next(counts),
        blocks={
            name: BlockLists(next(others), next(counts), blocks.rows_per_block) for name, blocks in step.blocks.items()
        },
    )


def lined_up(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What is to be joined so that each tensor begins at a multiple of 16 bytes, as memory of its own does: Triton
    compiles other kernels for addresses that are none."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += [tensor.flatten()] if tensor.numel() % 2 == 0 else [tensor.flatten(), _FILLING]
    return pieces


def found_again(whole: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors' places in what `lined_up` gave, joined."""
    sizes = [tensor.numel() for tensor in tensors]
    rooms = whole.split([size + size % 2 for size in sizes])
    return [room[:size].view(t.shape) for room, size, t in zip(rooms, sizes, tensors, strict=True)]


def carried(step: StepInputs, carry: Callable[[Tensor], Tensor]) -> StepInputs:
    """A step in the host's memory as one on a device: all that kernels read of it goes there as one tensor."""
    host = torch.device("cpu")
    own, others, numbers = sized(step), ragged(step), ints(step)
    parts = [*own, *others, *(own_ints.on(host) for own_ints in numbers)]
    whole = carry(torch.cat(lined_up(parts)))
    there = found_again(whole, parts)
    places, counts = there[: len(own) + len(others)], there[len(own) + len(others) :]
    for own_ints, tensor in zip(numbers, counts, strict=True):
        own_ints.copies[whole.device] = tensor
    return rebuilt(step, places[: len(own)], places[len(own) :], numbers)


def _of_compressor(inputs: CompressorInputs) -> list[Tensor]:
    tensors = [inputs.pending_slots, inputs.own, inputs.positions, *inputs.entries.values()]
    tensors += [inputs.pending_writes.source, inputs.pending_writes.slots]
    if inputs.tail_writes is not None and inputs.tail_slots is not None and inputs.previous is not None:
        tensors += [inputs.tail_slots, inputs.previous, inputs.tail_writes.source, inputs.tail_writes.slots]
    return tensors


def _compressor(inputs: CompressorInputs | None, tensors: Iterator[Tensor]) -> CompressorInputs | None:
    if inputs is None:
        return None
    pending, own, positions = next(tensors), next(tensors), next(tensors)
    entries = {name: next(tensors) for name in inputs.entries}
    writes = RowWrites(next(tensors), next(tensors))
    if inputs.tail_slots is None:
        return CompressorInputs(inputs.ratio, pending, own, positions, entries, writes)
    tail, previous, tail_writes = next(tensors), next(tensors), RowWrites(next(tensors), next(tensors))
    return CompressorInputs(inputs.ratio, pending, own, positions, entries, writes, tail, previous, tail_writes)
