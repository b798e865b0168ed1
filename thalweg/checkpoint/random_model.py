"""Random parameters that make every code path matter: logits of standard deviation about 2, no flat gates or sinks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thalweg.checkpoint.parameters import Parameter, parameters
from thalweg.config.model import ModelConfig


def random_parameters(config: ModelConfig, seed: int) -> Iterator[tuple[Parameter, Tensor]]:
    """Every parameter with fp32 (or int64) values, one after another; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters(config):
        yield parameter, _values(parameter, config, generator)


def _values(parameter: Parameter, config: ModelConfig, generator: torch.Generator) -> Tensor:
    name, shape = parameter.name, parameter.shape

    def normal(scale: float, center: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + center

    if name.endswith("tid2eid"):
        return torch.rand(shape[0], config.num_experts, generator=generator).argsort(-1)[:, : shape[1]].contiguous()
    if name.endswith("norm.weight"):
        return normal(0.1, 1.0)
    if name.endswith(("_scale", "attn_sink", "gate.bias")):
        return normal(0.3, 0.7 if name.endswith("_scale") else 0.0)
    if name.endswith("_base"):
        return normal(0.7)
    if name.endswith("ape"):
        return normal(0.5)
    if name == "embed.weight":
        return normal(1.0)
    gain = 2.0 if name == "head.weight" else 1.0
    return normal(gain * shape[-1] ** -0.5)
