"""Small checkpoints on disk: written, changed, loaded back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.model.fields import FLASH_LIKE
from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.random_model import random_parameters
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.checkpoint.writer import WriteFormat, write_checkpoint
from thalweg.config.model_parse import parse_model_config
from thalweg.model.weights import allocate

QUANTIZED = {
    **FLASH_LIKE, "hidden_size": 160, "moe_intermediate_size": 64, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "expert_dtype": "fp4",
}  # fmt: skip


def write(directory: Path, fields: dict[str, Any] = FLASH_LIKE, seed: int = 0, **form: Any) -> Path:
    values = random_parameters(parse_model_config(fields), seed)
    write_checkpoint(directory, fields, values, WriteFormat(**{"plain": torch.float32, **form}))
    return directory


def load(directory: Path) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint; every element must have been written."""
    checkpoint = open_checkpoint(directory)
    tensors = allocate(checkpoint.config, torch.float32, torch.device("cpu"))
    for tensor in tensors.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    report = load_parameters(checkpoint, tensors)
    assert report.parameters == len(tensors)
    for name, tensor in tensors.items():
        assert not (tensor.isnan() if tensor.is_floating_point() else tensor == -7).any(), name
    return tensors


def edited(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The same checkpoint after a change to the tensors of its one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return directory
