"""The measured tables as values. Refuses a file whose columns or figures are not what they should be, by line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from thalweg.errors import ConfigError
from thalweg.planner.hardware import device_name

KERNEL_COLUMNS = (
    "system", "framework", "version", "kind", "model", "compress_ratio", "tp", "batch", "new_tokens", "context",
    "latency_ms", "variant",
)  # fmt: skip
OP_COLUMNS = (
    "system", "framework", "version", "kind", "model", "quant", "tp", "ep", "tokens", "bytes", "latency_ms",
)  # fmt: skip
SERVING_COLUMNS = (
    "hw", "model", "quant", "engine", "config", "gpus", "isl", "osl", "concurrency", "ttft_ms", "tpot_ms",
    "total_tok_s_gpu", "out_tok_s_gpu", "inflight_per_gpu", "note", "source",
)  # fmt: skip

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One measured time of an attention layer (`*_module`) or of one of its kernels on an accelerator."""

    system: str
    framework: str
    version: str
    kind: str
    model: str
    tp: int
    batch: int
    new_tokens: int
    context: int
    variant: str
    seconds: float


@dataclass(frozen=True, slots=True)
class OpRow:
    """One measured time of another op: experts, hyper-connections, a GEMM, a collective."""

    system: str
    framework: str
    kind: str
    model: str
    quant: str
    tp: int
    ep: int
    tokens: int
    bytes: int
    seconds: float


def read_rows(name: str) -> list[dict[str, str]]:
    """Rows of a table of the package."""
    text = (resources.files("thalweg") / "data" / "planner" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def read_file(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a file of the user. Raises ConfigError if it is no table of these columns."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"rows: {path} cannot be read: {error}", param="rows") from None
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"rows: {path} lacks the columns {', '.join(missing)}", param="rows")
    return rows


def numbers(row: Row, skip: Iterable[str] = ()) -> dict[str, float | None]:
    """The figures of a row; None where a cell is empty."""
    return {k: float(v) if v not in ("", None) else None for k, v in row.items() if k not in skip}


def _kernel_row(row: Row) -> KernelRow:
    return KernelRow(
        device_name(row["system"]),
        row["framework"],
        row["version"],
        row["kind"],
        row["model"],
        int(row["tp"]),
        int(row["batch"]),
        int(row["new_tokens"]),
        int(row["context"]),
        row["variant"],
        float(row["latency_ms"]) * 1e-3,
    )


def kernel_rows(rows: Iterable[Row], name: str) -> tuple[KernelRow, ...]:
    """Rows of the kernel table. Raises ConfigError naming the line that is none."""
    found = []
    for line, row in enumerate(rows, start=2):
        try:
            found.append(_kernel_row(row))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rows: line {line} of {name}: {error}", param="rows") from None
    return tuple(found)


@cache
def shipped_kernel_rows() -> tuple[KernelRow, ...]:
    """The package's kernel table."""
    return kernel_rows(read_rows("v4_kernel_times.csv"), "v4_kernel_times.csv")


@cache
def shipped_op_rows() -> tuple[OpRow, ...]:
    """The package's table of other ops."""
    return tuple(
        OpRow(
            device_name(row["system"]),
            row["framework"],
            row["kind"],
            row["model"],
            row["quant"],
            int(row["tp"]),
            int(row["ep"]),
            int(row["tokens"]),
            int(row["bytes"]),
            float(row["latency_ms"]) * 1e-3,
        )
        for row in read_rows("v4_op_times.csv")
    )
