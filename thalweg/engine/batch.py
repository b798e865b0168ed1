"""From a step plan to the model's inputs: the one place where token positions become slots.

Everything is computed once per step with numpy and serves all layers; the model only gathers and scatters.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thalweg.cache.geometry import CacheGroupSpec
from thalweg.cache.tables import SlidingTable
from thalweg.config.model import ModelConfig
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.kernels.arguments import Segments
from thalweg.model.inputs import BlockLists, CompressorInputs, RowWrites, StepInputs

Positions = npt.NDArray[np.int64]


class BatchBuilder:
    """Builds StepInputs for one model and device."""

    def __init__(self, config: ModelConfig, groups: SequenceOf[CacheGroupSpec], device: torch.device) -> None:
        self._config = config
        self._device = device
        self._streams = {s.name: (spec, s) for spec in groups for s in spec.streams}

    def build(self, plan: StepPlan) -> StepInputs:
        """All inputs of one forward pass; its rows are the plan's tokens, sequence after sequence."""
        items = plan.sequences
        offsets = _offsets([item.tokens for item in items])
        tokens = np.concatenate([item.running.sequence.tokens[item.start : item.end] for item in items])
        past = [self._slots("window", item, np.arange(self._past_start(item), item.start)) for item in items]
        output = np.array([end - 1 for end, item in zip(offsets[1:], items, strict=True) if item.samples], np.int64)
        sampling = Segments(_offsets([int(item.samples) for item in items]), tuple(item.end - 1 for item in items))
        return StepInputs(
            token_ids=self._tensor(tokens.astype(np.int64)),
            positions=self._tensor(np.concatenate([np.arange(item.start, item.end) for item in items])),
            segments=Segments(offsets, tuple(item.start for item in items)),
            output_rows=self._tensor(output),
            output_segments=sampling,
            past_slots=self._tensor(np.concatenate(past)),
            past_offsets=_offsets([len(p) for p in past]),
            window_writes=self._writes("window", items, offsets, [np.arange(i.start, i.end) for i in items]),
            blocks={name: self._blocks(name, items) for name in ("csa", "index", "hca") if name in self._streams},
            csa=self._compressor("csa", self._config.csa_ratio, items, offsets) if "csa" in self._streams else None,
            hca=self._compressor("hca", self._config.hca_ratio, items, offsets) if "hca" in self._streams else None,
        )

    def _past_start(self, item: SequencePlan) -> int:
        """First position before the step that its first token's window still sees; a replay begins without a window."""
        return max(item.running.cache.state_from, item.start - self._config.window + 1)

    def _tensor(self, values: Positions) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self._device)

    def _blocks(self, name: str, items: SequenceOf[SequencePlan]) -> BlockLists:
        spec, stream = self._streams[name]
        lists = [i.running.cache.growing[spec.group].ids(-(-i.end // spec.tokens_per_block)) for i in items]
        return BlockLists(self._tensor(np.concatenate(lists)), _offsets([len(x) for x in lists]), stream.rows_per_block)

    def _slots(self, name: str, item: SequencePlan, positions: Positions) -> Positions:
        """Slots of the rows of a stream that hold these positions; -1 where the request keeps no block for them."""
        spec, stream = self._streams[name]
        blocks = self._block_ids(spec, item, positions // spec.tokens_per_block)
        row = positions // stream.tokens_per_row % stream.rows_per_block
        return np.where(blocks < 0, -1, blocks * stream.rows_per_block + row)

    def _block_ids(self, spec: CacheGroupSpec, item: SequencePlan, numbers: Positions) -> Positions:
        if len(numbers) == 0:
            return numbers
        if spec.compressed:
            return item.running.cache.growing[spec.group].ids(int(numbers[-1]) + 1)[numbers]
        return _sliding_ids(item.running.cache.sliding[spec.group], numbers)

    def _writes(
        self, name: str, items: SequenceOf[SequencePlan], offsets: tuple[int, ...], kept: SequenceOf[Positions]
    ) -> RowWrites:
        """Scatter of new rows: of each sequence the positions in `kept` that have a block."""
        sources, slots = [], []
        for item, offset, positions in zip(items, offsets, kept, strict=False):
            found = self._slots(name, item, positions)
            sources.append((positions - item.start + offset)[found >= 0])
            slots.append(found[found >= 0])
        return RowWrites(self._tensor(np.concatenate(sources)), self._tensor(np.concatenate(slots)))

    def _compressor(
        self, kind: str, ratio: int, items: SequenceOf[SequencePlan], offsets: tuple[int, ...]
    ) -> CompressorInputs:
        """Inputs of all compressors of one ratio; those of CSA layers overlap with the window before."""
        overlap = kind == "csa"
        own, pending = self._gather(f"pending_{kind}", items, offsets, ratio, 0)
        positions = [_windows(i, ratio) * ratio for i in items]
        streams = ("csa", "index") if overlap else ("hca",)
        open_tokens = [np.arange(max(i.start, i.end // ratio * ratio), i.end) for i in items]
        entries = {
            name: self._tensor(np.concatenate([self._slots(name, i, p) for i, p in zip(items, positions, strict=True)]))
            for name in streams
        }
        shared = {
            "ratio": ratio,
            "pending_slots": self._tensor(pending),
            "own": self._tensor(own),
            "positions": self._tensor(np.concatenate(positions)),
            "entries": entries,
            "pending_writes": self._writes(f"pending_{kind}", items, offsets, open_tokens),
        }
        if not overlap:
            return CompressorInputs(**shared)  # type: ignore[arg-type]
        previous, tail = self._gather("tail_csa", items, offsets, ratio, ratio)
        every = [np.arange(i.start, i.end) for i in items]
        return CompressorInputs(
            **shared,  # type: ignore[arg-type]
            tail_slots=self._tensor(tail),
            previous=self._tensor(previous),
            tail_writes=self._writes("tail_csa", items, offsets, every),
        )

    def _gather(
        self, name: str, items: SequenceOf[SequencePlan], offsets: tuple[int, ...], ratio: int, behind: int
    ) -> tuple[Positions, Positions]:
        """Where the tokens of each finished window lie: [E, ratio] into cat(cached rows, new rows), and the cached
        slots. `behind` shifts the window back by so many tokens; -1 stands for tokens before the sequence."""
        cached, index = [], []
        windows = [_windows(i, ratio)[:, None] * ratio - behind for i in items]
        begin = [i.running.cache.state_from for i in items]
        read = [
            np.arange(max(b, i.start // ratio * ratio - behind), i.start) for i, b in zip(items, begin, strict=True)
        ]
        counts = _offsets([len(r) for r in read])
        for place, (item, offset, old) in enumerate(zip(items, offsets, read, strict=False)):
            cached.append(self._slots(name, item, old))
            wanted = windows[place] + np.arange(ratio)[None, :]
            new = wanted - item.start + offset + counts[-1]
            in_cache = wanted - (item.start - len(old)) + counts[place]
            index.append(np.where(wanted < begin[place], -1, np.where(wanted >= item.start, new, in_cache)))
        return np.concatenate(index), np.concatenate(cached)


def _windows(item: SequencePlan, ratio: int) -> Positions:
    """The compression windows that this step completes and writes: not those whose rows a replay finds cached."""
    first = max(item.start, item.running.cache.rows_from)
    return np.arange(first // ratio, max(first, item.end) // ratio)


def _offsets(counts: SequenceOf[int]) -> tuple[int, ...]:
    return tuple(np.concatenate([[0], np.cumsum(counts)]).astype(int).tolist())


def _sliding_ids(table: SlidingTable, numbers: Positions) -> Positions:
    first = int(numbers[0])
    lookup = np.array([table.get(n) for n in range(first, int(numbers[-1]) + 1)], np.int64)
    return lookup[numbers - first]
