"""Text that is on every machine: the source files of the Python installation this runs on (PSF licence)."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"})


def library_files() -> Iterator[Path]:
    """Python files of the standard library without its tests, sorted by path: about 11 million characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT.intersection(path.relative_to(root).parts):
            yield path


def library_texts() -> Iterator[str]:
    """Contents of those files; undecodable bytes are replaced, files with NUL bytes left out."""
    for path in library_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if "\x00" not in text:
            yield text
