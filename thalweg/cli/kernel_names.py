"""What the verbs of `thalweg kernels` share: names of ops, models and backends, and lines of records."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.errors import ConfigError, nearest
from thalweg.kernels.spec import OPS, OpSpec

if TYPE_CHECKING:
    from thalweg.kernels.backends import Backend

Ops = Annotated[list[str] | None, typer.Argument(help="Names of ops as `list` shows them; all if left out.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Out = Annotated[Path | None, typer.Option(help="Add one JSON line per result to this file.")]
COMPILED = "cpu-"


def specs_of(ops: Sequence[str] | None) -> list[OpSpec]:
    """The ops by name, all if there are none. Raises ConfigError with the nearest name."""
    known = [spec.name for spec in OPS]
    for op in ops or ():
        if op not in known:
            raise ConfigError(f"there is no op {op!r}.{nearest(op, known)}", param="op")
    return [spec for spec in OPS if not ops or spec.name in ops]


def model_of(name: str) -> Any:
    from thalweg.kernels.cases.workloads import MODELS, model_config

    if name not in MODELS:
        raise ConfigError(f"--shape: {name!r} is not one of {', '.join(MODELS)}.{nearest(name, MODELS)}", param="shape")
    return model_config(name)


def backends_of(wanted: str | None) -> tuple[Backend, ...]:
    """The usable ones, or the wanted one. Raises ConfigError if that is unknown or cannot run here."""
    from thalweg.kernels.backends import every_backend

    backends = {backend.name.removeprefix(COMPILED): backend for backend in every_backend()}
    if wanted is None:
        return tuple(backend for backend in backends.values() if backend.kernels is not None)
    chosen = backends.get(wanted.removeprefix(COMPILED))
    if chosen is None:
        names = ", ".join(backends)
        raise ConfigError(f"--kernels: {wanted!r} is not one of {names}.{nearest(wanted, backends)}", param="kernels")
    if chosen.kernels is None:
        raise ConfigError(f"--kernels: {chosen.missing}", param="kernels")
    return (chosen,)


@contextmanager
def appended(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes records and writes each as a line at once; without a path they go nowhere."""
    if path is None:
        yield lambda record: None
        return
    try:
        file = path.open("a", buffering=1)
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}", param="out") from error
    with file:
        yield lambda record: print(json.dumps(record), file=file)


def commit_of_sources() -> str | None:
    """The commit of a checkout that these sources are part of; None for an installed package."""
    folder = Path(__file__).parent
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
    head = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        if subprocess.run(tracked, capture_output=True, check=False).returncode:
            return None
        return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def facts_of(backend: str) -> dict[str, Any]:
    """What a record about a backend must say to be held against it later: where it ran, and by what."""
    import torch

    from thalweg.kernels.triton.mode import interpreting

    facts: dict[str, Any] = {"commit": commit_of_sources(), "torch": torch.__version__}
    if backend != "triton":
        return facts | {"where": "cpu"}
    import triton

    facts["triton"] = triton.__version__
    if interpreting():
        return facts | {"where": "interpreter"}
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{10 * major + minor}a"
    return facts | {"where": arch, "arch": arch, "device": torch.cuda.get_device_name()}
