"""From a step plan to the model's inputs: the one place where token positions become slots.

Everything is computed once per step and serves all layers; the model only gathers and scatters. A decode step has a
few hundred numbers of some twenty kinds, so they are written into one list and become one tensor, which is then split:
arithmetic on many small arrays would take longer than the forward pass of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from thalweg.cache.geometry import CacheGroupSpec
from thalweg.config.model import ModelConfig
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.kernels.arguments import Ints, Segments
from thalweg.model.inputs import BlockLists, CompressorInputs, RowWrites, StepInputs


class _Numbers:
    """Lists of whole numbers that will be tensors: `put` them all in order, then `take` them in the same order."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._sizes: list[int] = []

    def put(self, values: Iterable[int]) -> None:
        before = len(self._values)
        self._values.extend(values)
        self._sizes.append(len(self._values) - before)

    def tensors(self) -> Iterator[Tensor]:
        """int64, views of one tensor."""
        return iter(torch.from_numpy(np.array(self._values, np.int64)).split(self._sizes))


class BatchBuilder:
    """Builds StepInputs for one model, in the host's memory."""

    def __init__(self, config: ModelConfig, groups: SequenceOf[CacheGroupSpec]) -> None:
        self._config = config
        self._streams = {s.name: (spec, s) for spec in groups for s in spec.streams}
        self._ratios = {"csa": config.csa_ratio, "hca": config.hca_ratio}
        self._kinds = [kind for kind in ("csa", "hca") if kind in self._streams]

    def build(self, plan: StepPlan) -> StepInputs:
        """All inputs of one forward pass; its rows are the plan's tokens, sequence after sequence."""
        items = plan.sequences
        offsets = Ints.offsets(item.tokens for item in items)
        past = [self._slots("window", item, self._past_start(item), item.start) for item in items]
        numbers = _Numbers()
        numbers.put(chain.from_iterable(i.running.sequence.tokens[i.start : i.end].tolist() for i in items))
        numbers.put(chain.from_iterable(range(item.start, item.end) for item in items))
        numbers.put(end - 1 for end, item in zip(offsets[1:], items, strict=True) if item.samples)
        numbers.put(chain.from_iterable(past))
        self._put_writes(numbers, "window", items, offsets, [item.start for item in items])
        for kind in self._kinds:
            self._put_compressor(numbers, kind, items, offsets)
        tensors = numbers.tensors()
        return StepInputs(
            token_ids=next(tensors),
            positions=next(tensors),
            segments=Segments(offsets, Ints(item.start for item in items)),
            output_rows=next(tensors),
            output_segments=Segments(Ints.offsets(int(i.samples) for i in items), Ints(i.end - 1 for i in items)),
            past_slots=next(tensors),
            past_offsets=Ints.offsets(len(p) for p in past),
            window_writes=RowWrites(next(tensors), next(tensors)),
            blocks={name: self._blocks(name, items) for name in ("csa", "index", "hca") if name in self._streams},
            csa=self._taken_compressor("csa", tensors),
            hca=self._taken_compressor("hca", tensors),
        )

    def _past_start(self, item: SequencePlan) -> int:
        """First position before the step that its first token's window still sees; a replay begins without a window."""
        return max(item.running.cache.state_from, item.start - self._config.window + 1)

    def _blocks(self, name: str, items: SequenceOf[SequencePlan]) -> BlockLists:
        spec, stream = self._streams[name]
        lists = [i.running.cache.growing[spec.group].ids(-(-i.end // spec.tokens_per_block)) for i in items]
        ids = lists[0] if len(lists) == 1 else np.concatenate(lists)
        return BlockLists(torch.from_numpy(ids), Ints.offsets(len(x) for x in lists), stream.rows_per_block)

    def _slots(self, name: str, item: SequencePlan, start: int, end: int) -> list[int]:
        """Slots of the rows of a stream that hold the tokens [start, end), `start` the first of its row; -1 where the
        request keeps no block for them."""
        if start >= end:
            return []
        spec, stream = self._streams[name]
        cache = item.running.cache
        span, rows, step = spec.tokens_per_block, stream.rows_per_block, stream.tokens_per_row
        if end - start == step:  # as decoding asks for: one row
            number = start // span
            block = cache.growing[spec.group][number] if spec.compressed else cache.sliding[spec.group].get(number)
            return [-1 if block < 0 else block * rows + start // step % rows]
        slots: list[int] = []
        for number in range(start // span, -(-end // span)):
            places = range(max(start, number * span) // step, -(-min(end, (number + 1) * span) // step))
            block = cache.growing[spec.group][number] if spec.compressed else cache.sliding[spec.group].get(number)
            first = places.start % rows
            if block < 0:
                slots.extend([-1] * len(places))
            elif first + len(places) <= rows:
                slots.extend(range(block * rows + first, block * rows + first + len(places)))
            else:
                slots.extend(block * rows + place % rows for place in places)
        return slots

    def _put_writes(
        self,
        numbers: _Numbers,
        name: str,
        items: SequenceOf[SequencePlan],
        offsets: tuple[int, ...],
        begins: SequenceOf[int],
    ) -> None:
        """Scatter of new rows: of each sequence those from its `begin` on that have a block."""
        sources: list[int] = []
        slots: list[int] = []
        for item, offset, begin in zip(items, offsets, begins, strict=False):
            found = self._slots(name, item, begin, item.end)
            places = range(begin - item.start + offset, item.end - item.start + offset)
            if -1 in found:
                sources.extend(place for place, slot in zip(places, found, strict=True) if slot >= 0)
                slots.extend(slot for slot in found if slot >= 0)
            else:
                sources.extend(places)
                slots.extend(found)
        numbers.put(sources)
        numbers.put(slots)

    def _put_compressor(
        self, numbers: _Numbers, kind: str, items: SequenceOf[SequencePlan], offsets: tuple[int, ...]
    ) -> None:
        """Inputs of all compressors of one ratio, in the order in which `_taken_compressor` takes them; those of CSA
        layers overlap with the window before."""
        ratio, overlap = self._ratios[kind], kind == "csa"
        windows = [_windows(item, ratio) for item in items]
        self._put_gather(numbers, f"pending_{kind}", items, offsets, windows, ratio, 0)
        numbers.put(chain.from_iterable(range(w.start * ratio, w.stop * ratio, ratio) for w in windows))
        for name in ("csa", "index") if overlap else ("hca",):
            numbers.put(
                chain.from_iterable(
                    self._slots(name, i, w.start * ratio, w.stop * ratio) for i, w in zip(items, windows, strict=True)
                )
            )
        open_from = [max(item.start, item.end // ratio * ratio) for item in items]
        self._put_writes(numbers, f"pending_{kind}", items, offsets, open_from)
        if overlap:
            self._put_gather(numbers, "tail_csa", items, offsets, windows, ratio, ratio)
            self._put_writes(numbers, "tail_csa", items, offsets, [item.start for item in items])

    def _taken_compressor(self, kind: str, tensors: Iterator[Tensor]) -> CompressorInputs | None:
        if kind not in self._kinds:
            return None
        ratio, overlap = self._ratios[kind], kind == "csa"
        pending, own, positions = next(tensors), next(tensors).view(-1, ratio), next(tensors)
        entries = {name: next(tensors) for name in (("csa", "index") if overlap else ("hca",))}
        writes = RowWrites(next(tensors), next(tensors))
        if not overlap:
            return CompressorInputs(ratio, pending, own, positions, entries, writes)
        tail, previous = next(tensors), next(tensors).view(-1, ratio)
        return CompressorInputs(
            ratio, pending, own, positions, entries, writes, tail, previous, RowWrites(next(tensors), next(tensors))
        )

    def _put_gather(
        self,
        numbers: _Numbers,
        name: str,
        items: SequenceOf[SequencePlan],
        offsets: tuple[int, ...],
        windows: SequenceOf[range],
        ratio: int,
        behind: int,
    ) -> None:
        """The cached slots that the finished windows need, then where the tokens of each lie: [E, ratio] into
        cat(cached rows, new rows). `behind` shifts the window back by so many tokens; -1 stands for tokens before the
        sequence."""
        if not any(windows):
            numbers.put(())
            numbers.put(())
            return
        begins = [item.running.cache.state_from for item in items]
        reads = [  # of a sequence that finishes no window: nothing
            max(begin, item.start // ratio * ratio - behind) if own else item.start
            for begin, item, own in zip(begins, items, windows, strict=True)
        ]
        counts = Ints.offsets(max(0, item.start - read) for item, read in zip(items, reads, strict=True))
        numbers.put(
            chain.from_iterable(
                self._slots(name, item, read, item.start) for item, read in zip(items, reads, strict=True)
            )
        )
        places: list[int] = []
        for n, (item, begin, own) in enumerate(zip(items, begins, windows, strict=True)):
            first, last = own.start * ratio - behind, own.stop * ratio - behind
            absent, cached = min(max(begin, first), last), min(max(item.start, first), last)
            in_cache = counts[n + 1] - item.start  # the cached rows of a sequence end with the token before the step
            new = offsets[n] + counts[-1] - item.start
            places.extend([-1] * (absent - first))
            places.extend(range(absent + in_cache, cached + in_cache))
            places.extend(range(max(absent, cached) + new, last + new))
        numbers.put(places)


def _windows(item: SequencePlan, ratio: int) -> range:
    """The compression windows that this step completes and writes: not those whose rows a replay finds cached."""
    first = max(item.start, item.running.cache.rows_from)
    return range(first // ratio, max(first, item.end) // ratio)
