"""What the disk tier asks of the operating system, and nothing more: tests put failing disks in its place."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

_MOST_BYTES = 1 << 30  # of one call; the system's own limit is 2 GiB

Buffer = bytes | memoryview


class Files:
    """Operations on files by path. All raise OSError."""

    def create(self, path: Path) -> int:
        """Open a new file, readable by its owner only, for writing; its descriptor."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, parts: Sequence[Buffer]) -> None:
        """Append all parts."""
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(descriptor, rest[:_MOST_BYTES]) :]

    def sync(self, descriptor: int) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(descriptor)

    def open(self, path: Path) -> int:
        """Open a file for reading; its descriptor."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, descriptor: int, into: memoryview, offset: int) -> int:
        """Fill a buffer from an offset; the bytes read: fewer only at the end of the file."""
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done : done + _MOST_BYTES]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def size(self, descriptor: int) -> int:
        """Bytes of an open file."""
        return os.fstat(descriptor).st_size

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file its final name."""
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """Delete a file. One that is not there is no error."""
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def listing(self, directory: Path) -> dict[str, os.stat_result]:
        """Name and state of each plain file in a directory."""
        with os.scandir(directory) as entries:
            states = [(entry.name, _state(entry)) for entry in entries]
        return {name: state for name, state in states if state is not None and stat.S_ISREG(state.st_mode)}


def _state(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None if another process has deleted it meanwhile."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
