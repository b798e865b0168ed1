"""Steps of few tokens, repeated by the backend where it can (ops.Repeat, kernels/cpu/calls.py)."""

from __future__ import annotations

from torch import Tensor

from thalweg.kernels.arguments import Ints
from thalweg.kernels.ops import Repeat
from thalweg.model.inputs import CacheRows, CompressorInputs, StepInputs
from thalweg.model.step import StepTables
from thalweg.model.transformer import Model

MOST_TOKENS = 16  # of a step that is repeated: in larger ones the kernels' own time is what counts


class RepeatedModel:
    """`Model.forward` over one cache, bit for bit. `repeat` is None where every step is computed call by call."""

    def __init__(self, model: Model, cache: CacheRows, repeat: Repeat | None) -> None:
        self._model = model
        self._cache = cache
        self._repeat = repeat

    def forward(self, step: StepInputs) -> Tensor:
        """Logits fp32 [O, vocab]."""
        if self._repeat is None or len(step.token_ids) > MOST_TOKENS:
            return self._model.forward(step, self._cache)
        streams, tables = self._model.begin(step)
        sized, others = _tensors(streams, tables, step)
        ints = _ints(step)
        # Block lists and window rows may be of any length: kernels find it in the offsets. Python sees all other sizes.
        shape = (*[x.numel() for x in sized], *[x.numel() > 0 for x in others], len(step.segments))
        return self._repeat.run(
            shape,
            [*sized, *others],
            ints,
            lambda: self._model.through_layers(streams, tables, step, self._cache),
        )


def _tensors(streams: Tensor, tables: StepTables, step: StepInputs) -> tuple[list[Tensor], list[Tensor]]:
    """All that the layers read, the second of them of any length."""
    sized = [streams, step.token_ids, step.positions, step.output_rows]
    sized += [step.window_writes.source, step.window_writes.slots]
    for angles in (tables.window, tables.compressed):
        sized += [angles.cos, angles.sin, angles.back]
    for inputs, angles, phase in tables.compressors.values():
        sized += [angles.cos, angles.sin, angles.back, phase, *_of_compressor(inputs)]
    return sized, [step.past_slots, *(blocks.ids for blocks in step.blocks.values())]


def _of_compressor(inputs: CompressorInputs) -> list[Tensor]:
    tensors = [inputs.pending_slots, inputs.own, inputs.positions, *inputs.entries.values()]
    tensors += [inputs.pending_writes.source, inputs.pending_writes.slots]
    if inputs.tail_writes is not None and inputs.tail_slots is not None and inputs.previous is not None:
        tensors += [inputs.tail_slots, inputs.previous, inputs.tail_writes.source, inputs.tail_writes.slots]
    return tensors


def _ints(step: StepInputs) -> list[Ints]:
    segments = [ints for own in (step.segments, step.output_segments) for ints in (own.offsets, own.starts)]
    return [*segments, step.past_offsets, *(blocks.offsets for blocks in step.blocks.values())]
