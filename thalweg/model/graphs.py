"""Steps on a device of its own: decode steps as captured graphs, others kernel by kernel, and no step waits for the
device before its tokens are read.

A graph does the same work on the same memory every time. So every decode step is padded to its bucket, copied over the
step that the bucket's graph was captured with, and replayed. Nothing that differs between two steps of a bucket may be
seen by Python as the graph is captured: lengths are in memory, and Python is told their bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Ints
from thalweg.kernels.ops import Capture
from thalweg.model import parts
from thalweg.model.inputs import CacheRows, StepInputs
from thalweg.model.padding import Bucket, bucket_of, padded
from thalweg.model.transformer import Model


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most sequences of a step, and the most tokens of a context."""

    sequences: int
    context: int


class Mirror:
    """Numbers at a fixed place of the device, and in the host's memory what is next copied there."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.there = torch.zeros(length + length % 2, dtype=torch.int64, device=device)
        self._here = torch.zeros(length + length % 2, dtype=torch.int64, pin_memory=device.type == "cuda")

    def put(self, tensors: list[Tensor]) -> None:
        """One after another. What was put before must have arrived: the tokens of a step are read before the next."""
        pieces = parts.lined_up(tensors)
        length = sum(map(len, pieces))
        torch.cat(pieces, out=self._here[:length])
        self.there[:length].copy_(self._here[:length], non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A bucket's own numbers, all but the lists of any length, and what computes the step that they describe."""

    numbers: Mirror
    replay: Callable[[], Tensor]


class GraphedModel:
    """`Model.forward` over one cache for steps in the host's memory; without `capture` every one kernel by kernel."""

    def __init__(
        self, model: Model, cache: CacheRows, device: torch.device, limits: StepLimits, capture: Capture | None
    ) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._capture = capture
        self._limits = limits
        self._graphs: dict[Bucket, _Graph] = {}
        self._lists: list[Mirror] = []

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return len(self._graphs)

    def forward(self, step: StepInputs) -> Tensor:
        """Logits fp32 [O, vocab] on the device, to be read before the next step."""
        bucket = None if self._capture is None else bucket_of(step, self._limits.context)
        if self._capture is None or bucket is None:
            return self._model.forward(parts.carried(step, self._carry), self._cache)
        made = padded(step, bucket)
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = self._recorded(self._capture, made, bucket)
        self._put(graph.numbers, made)
        return graph.replay()[: len(step.output_rows)]

    def _carry(self, whole: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return whole.pin_memory().to(self._device, non_blocking=True)
        return whole.to(self._device)

    def _put(self, numbers: Mirror, made: StepInputs) -> None:
        host = torch.device("cpu")
        numbers.put([*parts.sized(made), *(own.on(host) for own in parts.ints(made))])
        for mirror, values in zip(self._lists, parts.ragged(made), strict=True):
            mirror.put([values])

    def _recorded(self, capture: Capture, made: StepInputs, bucket: Bucket) -> _Graph:
        """Capture a bucket's graph, with `made` as the first step of it."""
        if not self._lists:
            self._lists = [Mirror(length, self._device) for length in self._most(len(made.blocks))]
        own, counts = parts.sized(made), [numbers.on(torch.device("cpu")) for numbers in parts.ints(made)]
        numbers = Mirror(sum(map(len, parts.lined_up([*own, *counts]))), self._device)
        self._put(numbers, made)
        places = parts.found_again(numbers.there, [*own, *counts])
        held = zip(places[len(own) :], _bounds(made, bucket, self._model.config), strict=True)
        step = parts.rebuilt(
            made,
            places[: len(own)],
            [mirror.there for mirror in self._lists],
            [Ints.held(place, bounds) for place, bounds in held],
        )
        return _Graph(numbers, capture.record(lambda: self._model.forward(step, self._cache)))

    def _most(self, streams: int) -> list[int]:
        """How long the lists of any length can be: window rows, then the blocks of each compressed stream."""
        config, sequences = self._model.config, 1 << (self._limits.sequences - 1).bit_length()
        blocks = sequences * _blocks(self._limits.context, config)
        return [sequences * (config.window - 1), *[blocks] * streams]


def _bounds(made: StepInputs, bucket: Bucket, config: ModelConfig) -> list[list[int]]:
    """What the numbers of a bucket's steps never exceed, in the order of `parts.ints`. Kernels find by them how large a
    grid must be; the offsets of rows are the same in all."""
    rows = list(made.segments.offsets)
    latest = [bucket.context - 1] * bucket.sequences
    past = [row * (config.window - 1) for row in rows]
    blocks = [row * _blocks(bucket.context, config) for row in rows]
    return [rows, latest, rows, latest, past, *[blocks] * len(made.blocks)]


def _blocks(tokens: int, config: ModelConfig) -> int:
    return -(-tokens // config.unit_tokens)
