"""Raw samples, one JSON object a line, so that a measurement that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError

Record = dict[str, Any]


class SampleFile:
    """Samples by key. The first line says what was asked of whom; a file of another measurement is refused.

    Each line is on the disk before `add` returns. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path, header: Record, *, fresh: bool = False) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.seconds = 0.0  # that all samples took
        if fresh:
            path.unlink(missing_ok=True)
        kept = self._read(header) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(kept)
        if not kept:
            self._append(header)

    def _read(self, header: Record) -> int:
        """Take in what is there; the number of its bytes that are whole lines."""
        whole = 0
        found = None
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                break
            whole += len(line)
            if found is None:
                found = record
                self._compare(found, header)
                continue
            self.records[record.pop("key")] = record
            self.seconds += record["took"]
        return whole

    def _compare(self, found: Record, header: Record) -> None:
        for name, value in header.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{self.path} has samples of another measurement: {name} was {found.get(name)!r} and is {value!r}; "
                    "--fresh discards them, --out names another directory",
                    param="out",
                )

    def add(self, key: str, record: Record, took: float) -> None:
        """Keep a sample; `took`: the seconds spent on it."""
        self._append({"key": key, **record, "took": round(took, 4)})
        self.records[key] = record
        self.seconds += took

    def _append(self, record: Record) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
