"""What accelerators can do at best: memory, bandwidth, dense peaks, links. Facts with their source, one row each in
data/planner/hardware.csv. Prices are the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from thalweg.errors import ConfigError, nearest
from thalweg.planner.tables import numbers, read_rows


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU. Bytes, bytes per second and direction, dense FLOP per second; `nvlink_gpus` share one NVLink domain.

    `fp4_flops` falls back to the FP8 peak where the device multiplies no FP4.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    fp8_flops: float
    fp4_flops: float
    nvlink: float
    nvlink_gpus: int
    network: float
    host_link: float
    source: str

    def link(self, gpus: int) -> float:
        """Bytes per second and direction of a GPU in a group of `gpus`: NVLink inside its domain, else the network."""
        return self.nvlink if gpus <= self.nvlink_gpus else self.network


@cache
def accelerators() -> Mapping[str, Accelerator]:
    """All known accelerators by name."""
    found = {}
    for row in read_rows("hardware.csv"):
        number = numbers(row, skip=("name", "source"))
        fp8 = number["fp8_flops"]
        assert fp8 is not None
        found[row["name"]] = Accelerator(
            name=row["name"],
            memory_bytes=int(number["memory_bytes"] or 0),
            bandwidth=number["bandwidth"] or 0.0,
            bf16_flops=number["bf16_flops"] or 0.0,
            fp8_flops=fp8,
            fp4_flops=number["fp4_flops"] or fp8,
            nvlink=number["nvlink"] or 0.0,
            nvlink_gpus=int(number["nvlink_gpus"] or 1),
            network=number["network"] or 0.0,
            host_link=number["host_link"] or 0.0,
            source=row["source"],
        )
    return found


def accelerator(name: str) -> Accelerator:
    """The accelerator of a name such as `b200` or `b200_sxm`. Raises ConfigError with the nearest known name."""
    known = accelerators()
    wanted = name.strip().lower().replace("-", "_")
    for candidate in (wanted, f"{wanted}_sxm"):
        if candidate in known:
            return known[candidate]
    short = [*known, *(n.removesuffix("_sxm") for n in known)]
    raise ConfigError(
        f"hardware: {name!r} is unknown.{nearest(wanted, short)} Known: {', '.join(known)}", param="hardware"
    )
