"""Rotation frequencies of the two kinds of layers, and cos/sin tables of a step (model-spec section 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.config.model import ModelConfig, YarnScaling


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin, fp32 [T, r/2]; `back` is -sin, of the rotation that undoes this one."""

    cos: Tensor
    sin: Tensor
    back: Tensor

    def at(self, rows: Tensor) -> Angles:
        """Those of some rows of the batch, in order."""
        if len(rows) == len(self.cos):
            return self
        return Angles(self.cos[rows], self.sin[rows], self.back[rows])


def angles(positions: Tensor, frequencies: Tensor) -> Angles:
    """Of positions [T]. One fp32 product of position and frequency: fp64 angles differ by up to 0.018 rad at a million
    tokens."""
    return both_angles(positions, frequencies[None])[0]


def both_angles(positions: Tensor, frequencies: Tensor) -> list[Angles]:
    """For several lists of frequencies [n, r/2] at once: a step of one token feels every operation."""
    theta = positions.to(torch.float32)[:, None] * frequencies[:, None]
    sin = theta.sin()
    return [Angles(*of_one) for of_one in zip(theta.cos(), sin, -sin, strict=True)]


def window_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Frequencies of layers without compression: plain, base rope_theta. fp32 [r/2]."""
    return _plain(config.rope_theta, config.rope_dim).to(device)


def compressed_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Frequencies of everything inside CSA and HCA layers: base compress_rope_theta, with YaRN. fp32 [r/2]."""
    plain = _plain(config.compress_rope_theta, config.rope_dim)
    if config.yarn is None:
        return plain.to(device)
    low, high = _yarn_range(config.yarn, config.compress_rope_theta, config.rope_dim)
    ramp = ((torch.arange(config.rope_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return (plain / config.yarn.factor * (1 - keep) + plain * keep).to(device)


def _plain(base: float, dim: int) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _yarn_range(yarn: YarnScaling, base: float, dim: int) -> tuple[float, float]:
    """The pairs between which YaRN blends from unscaled to scaled frequencies."""

    def pair(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), dim - 1)
    return low, high if high > low else low + 0.001
