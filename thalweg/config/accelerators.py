"""What accelerators can do at most, from their data sheets: thalweg/data/accelerators.csv, each row with its source."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources

from thalweg.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU. Bytes; bytes per second of memory and, in one direction, of the link among `link_gpus`, of the network
    beyond them and of the link to the host; operations per second of dense products in bf16, fp8 and fp4 (None where it
    has none) and of ordinary fp32 arithmetic. `architecture` is what kernels are compiled for."""

    name: str
    memory_bytes: int
    bandwidth: float
    bf16: float
    fp8: float
    fp4: float | None
    fp32: float
    link: float
    link_gpus: int
    network: float
    host_link: float
    multiprocessors: int
    architecture: str
    source: str


def accelerators() -> dict[str, Accelerator]:
    """All that are known, by name."""
    text = (resources.files("thalweg") / "data" / "accelerators.csv").read_text()
    return {row["name"]: _accelerator(row) for row in csv.DictReader(text.splitlines())}


def accelerator(name: str) -> Accelerator:
    """One by its name, in any case. Raises ConfigError with the nearest one."""
    known = accelerators()
    if name.upper() not in known:
        message = f"hardware: {name!r} is not one of {', '.join(known)}.{nearest(name.upper(), known)}"
        raise ConfigError(message, param="hardware")
    return known[name.upper()]


def _accelerator(row: dict[str, str]) -> Accelerator:
    rates = {name: float(row[name]) for name in ("bandwidth", "bf16", "fp8", "fp32", "link", "network", "host_link")}
    return Accelerator(
        name=row["name"],
        memory_bytes=int(row["memory_bytes"]),
        fp4=float(row["fp4"]) if row["fp4"] else None,
        link_gpus=int(row["link_gpus"]),
        multiprocessors=int(row["multiprocessors"]),
        architecture=row["architecture"],
        source=row["source"],
        **rates,
    )
