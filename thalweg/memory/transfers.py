"""The real mover: threads that copy between the pools and the tiers while the engine computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from thalweg.cache.geometry import Group
from thalweg.memory.jobs import Blocks, LoadJob, LoadPart, LoadResult, StoreJob
from thalweg.memory.packing import BlockPacker
from thalweg.memory.record import Bytes, Record, RecordKind
from thalweg.memory.tier import Tier

_log = logging.getLogger("thalweg.memory")
_DROPPED_REMEMBERED = 100_000  # digests of units


class Transfers:
    """One thread copies out of the pools, one writes, one reads: neither a prompt that waits for its rows nor a request
    that waits for blocks ever waits for somebody's writes. Two that read take turns at the interpreter's lock, and each
    turn may cost five milliseconds: they load more slowly than one."""

    def __init__(self, packer: BlockPacker, tiers: Mapping[str, Tier]) -> None:
        self._packer = packer
        self._tiers = tiers
        self._dropped: dict[str, set[bytes]] = {name: set() for name in tiers}  # the storing thread's
        self._gathering = ThreadPoolExecutor(1, "thalweg-gather", initializer=_one_thread)
        self._storing = ThreadPoolExecutor(1, "thalweg-store", initializer=_one_thread)
        self._loading = ThreadPoolExecutor(1, "thalweg-load", initializer=_one_thread)

    def prepare(self, units: int) -> None:
        """Get ready to load so many units, in the background: memory that nobody has touched yet is slower to fill than
        a file is to read, and threads take their time to begin."""
        self._gathering.submit(self._packer.take_pages, units)
        self._loading.submit(_one_thread)

    def store(self, job: StoreJob, done: Callable[[Sequence[bool]], None]) -> None:
        self._gathering.submit(self._gather, job, done)

    def _gather(self, job: StoreJob, done: Callable[[Sequence[bool]], None]) -> None:
        try:
            rows = job.head.kind is RecordKind.ROWS
            data = self._packer.pack_units(job.blocks) if rows else self._packer.pack_checkpoint(job.blocks)
        except Exception:
            _log.exception("a record could not be copied out of the pools")
            job.gathered.set()
            done((False,))
            return
        job.gathered.set()
        self._storing.submit(self._store, job.tiers, Record(job.head, data), done)

    def _store(self, tiers: Sequence[str], record: Record, done: Callable[[Sequence[bool]], None]) -> None:
        done([self._write(name, record) for name in tiers])

    def _write(self, name: str, record: Record) -> bool:
        """Write a record to a tier, unless what it hangs on did not get there: nobody would ever find it."""
        head, dropped, kept = record.head, self._dropped[name], False
        try:
            kept = head.anchor not in dropped and self._tiers[name].write(record)
        except Exception:
            _log.exception("a record could not be stored")
        if head.kind is RecordKind.ROWS:
            (dropped.difference_update if kept else dropped.update)(head.digests)
        if len(dropped) > _DROPPED_REMEMBERED:
            dropped.clear()
        return kept

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        futures = [self._loading.submit(self._load_part, part) for part in job.parts]
        futures.append(self._loading.submit(self._load_checkpoint, job))
        _when_all_are_done(futures, lambda arrived: done(_result(arrived)))

    def _load_part(self, part: LoadPart) -> bool:
        rows = self._tiers[part.tier].read_rows(part.piece, part.skip)
        if rows is None or not _is_bytes(rows, (part.units, self._packer.unit_bytes)):
            return False
        self._packer.unpack_units(rows, part.blocks)
        return True

    def _load_checkpoint(self, job: LoadJob) -> bool:
        if job.checkpoint is None:
            return False
        tier, digest, blocks = job.checkpoint
        data = self._tiers[tier].read_checkpoint(digest)
        if data is None or not _is_bytes(data, (self._packer.checkpoint_bytes,)):
            return False
        self._packer.unpack_checkpoint(data.reshape(1, -1), blocks)
        return True

    def take_out(self, blocks: Blocks) -> Mapping[Group, Bytes]:
        return {group: self._packer.pack(group, ids) for group, ids in blocks.items()}

    def put_back(self, data: Mapping[Group, Bytes], blocks: Blocks, done: Callable[[bool], None]) -> None:
        def work() -> bool:
            for group, ids in blocks.items():
                self._packer.unpack(group, data[group], ids)
            return True

        _when_all_are_done([self._loading.submit(work)], lambda filled: done(filled[0]))

    def block_bytes(self, group: Group) -> int:
        return self._packer.block_bytes(group)

    def close(self) -> None:
        self._gathering.shutdown()
        self._storing.shutdown()
        self._loading.shutdown()

    def abandon(self) -> None:
        for threads in (self._gathering, self._storing, self._loading):
            threads.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Copies of a few MiB gain nothing from OpenMP, and its workers would take the cores from the forward pass."""
    torch.set_num_threads(1)


def _is_bytes(data: Bytes, shape: tuple[int, ...]) -> bool:
    """Whether a tier gave what it was asked for: fewer rows would be spread over all blocks."""
    return data.shape == shape and data.dtype == np.uint8


def _result(arrived: Sequence[bool]) -> LoadResult:
    *parts, checkpoint = arrived
    return LoadResult(parts.index(False) if False in parts else len(parts), checkpoint)


def _when_all_are_done(futures: Sequence[Future[bool]], then: Callable[[list[bool]], None]) -> None:
    """Call `then` with all results once the last future is done. One that failed counts as False."""
    left, lock = [len(futures)], threading.Lock()

    def one_is_done(_: Future[bool]) -> None:
        with lock:
            left[0] -= 1
            last = left[0] == 0
        if last:
            then([_outcome(future) for future in futures])

    for future in futures:
        future.add_done_callback(one_is_done)


def _outcome(future: Future[bool]) -> bool:
    try:
        return not future.cancelled() and future.result()
    except Exception:
        _log.exception("rows could not be loaded")
        return False
