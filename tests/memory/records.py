"""Prompts as chains of digests, records of them, and disks that fail or die at the n-th operation. Imports no torch."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.memory.disk import DiskTier
from thalweg.memory.files import Files
from thalweg.memory.record import Record, RecordHead, RecordKind

NAMESPACE, OTHER = b"n" * 16, b"o" * 16


def chain(*units: int, namespace: bytes = NAMESPACE) -> list[bytes]:
    """Digests of a prompt whose units have these contents."""
    digests, parent = [], blake2b(namespace, digest_size=16).digest()
    for unit in units:
        parent = blake2b(parent + unit.to_bytes(4, "little"), digest_size=16).digest()
        digests.append(parent)
    return digests


def payload(digests: list[bytes], row_bytes: int) -> np.ndarray:
    """Rows that depend on their digests alone, so that every reader knows what to expect."""
    content = b"".join((digest * (row_bytes // len(digest) + 1))[:row_bytes] for digest in digests)
    return np.frombuffer(content, np.uint8).reshape(len(digests), row_bytes)


def rows(digests: list[bytes], first: int, end: int, row_bytes: int = 64, **changes: Any) -> Record:
    """The record of units [first, end) of a prompt."""
    namespace = changes.get("namespace", NAMESPACE)
    parent = digests[first - 1] if first else blake2b(namespace, digest_size=16).digest()
    own = tuple(digests[first:end])
    head = RecordHead(
        RecordKind.ROWS, namespace, parent, first, own, changes.get("origin", bytes(16)), 128 * len(own), 128
    )
    return Record(head, payload(list(own), row_bytes))


def checkpoint(digests: list[bytes], unit: int, size_bytes: int = 96) -> Record:
    """The checkpoint after unit number `unit`."""
    parent = digests[unit - 1] if unit else blake2b(NAMESPACE, digest_size=16).digest()
    own = (digests[unit],)
    head = RecordHead(RecordKind.CHECKPOINT, NAMESPACE, parent, unit, own, bytes(16), 512, 128)
    return Record(head, payload(list(own), size_bytes))


class Death(BaseException):
    """The process dies: nothing catches it."""


class FailingFiles:
    """Real files whose operations from number `first` on, counted from 0, `until` a later one, raise an error.

    `late` performs the operation before it raises; a write is then performed by half.
    """

    def __init__(self, first: int, error: BaseException, *, until: int = 1 << 60, late: bool = False) -> None:
        self.first, self.until, self.error, self.late = first, until, error, late
        self.count = 0
        self._real = Files()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)

        def operation(*arguments: Any) -> Any:
            number = self.count
            self.count += 1
            if not self.first <= number < self.until:
                return real(*arguments)
            if name == "close" and isinstance(self.error, OSError):
                real(*arguments)  # as the system does: the descriptor is gone
            elif self.late and number == self.first and name == "write":
                real(arguments[0], [memoryview(part)[: len(part) // 2] for part in arguments[1]])
            elif self.late and number == self.first and name != "close":
                real(*arguments)
            raise self.error

        return operation


def abandon(tier: DiskTier) -> None:
    """What the end of its process does to a tier: descriptors close, open transactions roll back."""
    tier._folder.catalogue.close()
    tier._lock.close()


def directory_bytes(directory: Path) -> int:
    """Bytes of all files in a directory, by length or by blocks, whichever is more."""
    total = 0
    for entry in os.scandir(directory):
        try:
            state = entry.stat()
        except FileNotFoundError:
            continue
        total += max(state.st_size, 512 * state.st_blocks)
    return total
