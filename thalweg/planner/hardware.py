"""Accelerators as the planner needs them: found under the names that measured tables use, with the link of a group."""

from __future__ import annotations

from functools import cache

from thalweg.config import accelerators
from thalweg.config.accelerators import Accelerator


def device_name(system: str) -> str:
    """`B200` of `b200`, `B200` or `b200_sxm`, known or not."""
    return system.strip().lower().removesuffix("_sxm").upper()


@cache
def accelerator(name: str) -> Accelerator:
    """The accelerator of a name. Raises ConfigError with the nearest known one."""
    return accelerators.accelerator(device_name(name))


def link(device: Accelerator, gpus: int) -> float:
    """Bytes per second and direction of a GPU in a group of `gpus`: the link where all share one, else the network."""
    return device.link if gpus <= device.link_gpus else device.network
