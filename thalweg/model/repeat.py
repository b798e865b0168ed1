"""Steps of few tokens, repeated by the backend where it can (ops.Repeat, kernels/cpu/calls.py)."""

from __future__ import annotations

from torch import Tensor

from thalweg.kernels.ops import Repeat
from thalweg.model import parts
from thalweg.model.inputs import CacheRows, StepInputs
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
        sized, others = [streams, *parts.sized(step), *_of_tables(tables)], parts.ragged(step)
        # Block lists and window rows may be of any length: kernels find it in the offsets. Python sees all other sizes.
        shape = (*[x.numel() for x in sized], *[x.numel() > 0 for x in others], len(step.segments))
        return self._repeat.run(
            shape,
            [*sized, *others],
            parts.ints(step),
            lambda: self._model.through_layers(streams, tables, step, self._cache),
        )


def _of_tables(tables: StepTables) -> list[Tensor]:
    tensors = [part for angles in (tables.window, tables.compressed) for part in (angles.cos, angles.sin, angles.back)]
    for _, angles, phase in tables.compressors.values():
        tensors += [angles.cos, angles.sin, angles.back, phase]
    return tensors
