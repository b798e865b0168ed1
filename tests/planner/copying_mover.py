"""A mover with the simulator's times whose bytes are real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thalweg.cache.geometry import Group
from thalweg.memory.jobs import Blocks, LoadJob, LoadResult, StoreJob
from thalweg.memory.packing import BlockPacker
from thalweg.memory.record import Bytes, RecordKind
from thalweg.planner.sim_tiers import VirtualMover


class CopyingMover(VirtualMover):
    """Copies when the simulated copy begins or ends."""

    def __init__(self, packer: BlockPacker, *rest: Any) -> None:
        super().__init__(*rest)
        self._packer = packer
        self._packed: Bytes | None = None

    def store(self, job: StoreJob, done: Callable[[Sequence[bool]], None]) -> None:
        rows = job.head.kind is RecordKind.ROWS
        self._packed = self._packer.pack_units(job.blocks) if rows else self._packer.pack_checkpoint(job.blocks)
        super().store(job, done)

    def _hollow(self, shape: tuple[int, int]) -> Bytes:
        assert self._packed is not None and self._packed.shape == shape, "the sizes of records differ"
        return self._packed

    def _arrived(self, job: LoadJob) -> LoadResult:
        parts, found = 0, False
        for part in job.parts:
            rows = self.tiers[part.tier].read_rows(part.piece, part.skip)
            if rows is None:
                break
            self._packer.unpack_units(rows, part.blocks)
            parts += 1
        if job.checkpoint is not None:
            tier, digest, blocks = job.checkpoint
            data = self.tiers[tier].read_checkpoint(digest)
            if data is not None:
                self._packer.unpack_checkpoint(data.reshape(1, -1), blocks)
                found = True
        return LoadResult(parts, found)

    def take_out(self, blocks: Blocks) -> Mapping[Group, Bytes]:
        super().take_out(blocks)
        return {group: self._packer.pack(group, ids) for group, ids in blocks.items()}

    def put_back(self, data: Mapping[Group, Bytes], blocks: Blocks, done: Callable[[bool], None]) -> None:
        def fill(ok: bool) -> None:
            for group, ids in blocks.items():
                self._packer.unpack(group, data[group], ids)
            done(ok)

        super().put_back(data, blocks, fill)
