"""Which files a Triton op is made of, and their hash: evidence counts for the code that it was got with."""

from __future__ import annotations

import ast
from functools import cache
from hashlib import blake2b
from pathlib import Path

_PACKAGE = "thalweg.kernels.triton"
_FOLDER = Path(__file__).parent


def source_hash(module: str) -> str:
    """Of a kernel file, by its name without .py, and of all files of this package that it imports."""
    digest = blake2b(digest_size=6)
    for name in sorted(_reached(module)):
        digest.update(name.encode() + b"\0" + (_FOLDER / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _reached(module: str) -> set[str]:
    found, open_ = set(), [module]
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            open_ += _imported(name)
    return found


@cache
def _imported(module: str) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse((_FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == _PACKAGE:
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_PACKAGE + "."):
            names.append(node.module.removeprefix(_PACKAGE + "."))
    return tuple(name for name in names if (_FOLDER / f"{name}.py").exists())
