"""Writing a checkpoint: tensors in either layout, plain or quantised, in shards, published by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from thalweg.checkpoint.formats import quantize_fp4, quantize_fp8
from thalweg.checkpoint.parameters import Parameter, Precision, Storage
from thalweg.checkpoint.reader import INDEX_FILE, CheckpointLayout
from thalweg.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class WriteFormat:
    """`plain` is the dtype of unquantised matrices; fp32 parameters stay fp32. `quantize`: FP8, with FP4 experts."""

    layout: CheckpointLayout = CheckpointLayout.OFFICIAL
    plain: torch.dtype = torch.bfloat16
    quantize: bool = False
    max_shard_bytes: int = 2 * 10**9


def write_checkpoint(
    directory: Path,
    config_fields: Mapping[str, Any],
    values: Iterable[tuple[Parameter, Tensor]],
    form: WriteFormat,
    extra_files: Iterable[Path] = (),
) -> int:
    """Write config.json, shards with an index, and copies of `extra_files`; returns the bytes of all tensors.

    `directory` must not exist or be empty; it appears complete or not at all. Raises CheckpointError where it cannot.
    """
    try:
        staging = _staging(directory.resolve())
        return _write_and_rename(staging, directory.resolve(), config_fields, values, form, extra_files)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}", param="directory") from error


def _staging(directory: Path) -> Path:
    """An empty directory beside the wanted one, which must not be in use."""
    if directory == Path.cwd():
        raise CheckpointError(f"{directory} is the current directory; name a new one", param="directory")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an empty directory", param="directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def _write_and_rename(
    staging: Path,
    directory: Path,
    config_fields: Mapping[str, Any],
    values: Iterable[tuple[Parameter, Tensor]],
    form: WriteFormat,
    extra_files: Iterable[Path],
) -> int:
    try:
        total = _write_shards(staging, _tensors(values, form), form.max_shard_bytes)
        (staging / "config.json").write_text(json.dumps(dict(config_fields), indent=2) + "\n")
        for file in extra_files:
            shutil.copyfile(file, staging / file.name)
        _sync(staging)
        if directory.exists():
            directory.rmdir()
        staging.rename(directory)
        _sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return total


def _tensors(values: Iterable[tuple[Parameter, Tensor]], form: WriteFormat) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors of engine parameters, in the wanted layout and format."""
    official = form.layout is CheckpointLayout.OFFICIAL
    for parameter, value in values:
        for piece in parameter.official if official else parameter.transformers:
            part = value
            if piece.expert is not None:
                part = value[piece.expert, piece.first_row : piece.first_row + piece.shape[0]]
            yield from _stored(parameter, piece.name, part, form)


def _stored(parameter: Parameter, name: str, value: Tensor, form: WriteFormat) -> Iterator[tuple[str, Tensor]]:
    if form.quantize and parameter.storage in (Storage.MATRIX, Storage.EXPERT):
        expert = parameter.storage is Storage.EXPERT
        weight, scale = quantize_fp4(value) if expert else quantize_fp8(value)
        yield name, weight
        yield name.removesuffix(".weight") + ".scale", scale.view(torch.float8_e8m0fnu)
        return
    keep = parameter.storage is Storage.FP32 or parameter.precision is Precision.INT64
    yield name, value.contiguous() if keep else value.to(form.plain).contiguous()


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> int:
    places: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    size = total = shard = 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if pending and size + count > max_shard_bytes:
            _save(pending, directory, shard)
            pending, size, shard = {}, 0, shard + 1
        pending[name] = tensor.clone()  # a view of a stacked parameter would be saved with all of it
        places[name] = shard
        size += count
        total += count
    _save(pending, directory, shard)
    _name_shards(directory, places, shard + 1, total)
    return total


def _save(tensors: dict[str, Tensor], directory: Path, shard: int) -> None:
    save_file(tensors, directory / f"shard-{shard}", metadata={"format": "pt"})


def _name_shards(directory: Path, places: Mapping[str, int], count: int, total: int) -> None:
    if count == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        (directory / f"shard-{i}").rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in sorted(places.items())}}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
