"""Opening a checkpoint directory: its config, its layout, and an index of its tensors, without reading any."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from safetensors import SafetensorError, safe_open

from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import PUBLISHED, load_model_config
from thalweg.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
# transformers 5.24 reads `kv_norm` but, after loading its own layout, saves `norm`: files have both spellings.
_SAVED_NORM = re.compile(r"(\.self_attn(?:\.compressor(?:\.indexer)?)?)\.norm\.weight$")
_SAMPLES = 64
_SAMPLE_BYTES = 4096


class CheckpointLayout(StrEnum):
    OFFICIAL = "official"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is stored, and under which name. `dtype` is safetensors' word: BF16, F8_E4M3, F8_E8M0, I8 ..."""

    shard: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. `config` has no MTP blocks where the layout cannot hold them."""

    directory: Path
    config: ModelConfig
    layout: CheckpointLayout
    tensors: Mapping[str, TensorEntry]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json and the headers of all shards. Raises ConfigError or CheckpointError naming file or tensor."""
    config = load_model_config(directory)
    if not directory.is_dir():
        published = f"; {directory} is a config without weights" if str(directory) in PUBLISHED else ""
        raise CheckpointError(f"{directory}: not a directory with a checkpoint{published}", param="model")
    tensors: dict[str, TensorEntry] = {}
    for shard in _shards(directory):
        for name, entry in _read_header(shard).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in {tensors[name].shard.name} and in {shard.name}", param=name)
            tensors[name] = entry
    _check_index(directory, tensors)
    if "embed.weight" in tensors:
        return Checkpoint(directory, config, CheckpointLayout.OFFICIAL, tensors)
    if "model.embed_tokens.weight" in tensors:
        return Checkpoint(directory, replace(config, num_mtp_layers=0), CheckpointLayout.TRANSFORMERS, _known(tensors))
    raise CheckpointError(
        f"{directory}: neither embed.weight (official layout) nor model.embed_tokens.weight (transformers layout)",
        param="embed.weight",
    )


def _known(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Under the names that transformers reads. A tensor that is there under both spellings is an error."""
    known: dict[str, TensorEntry] = {}
    for stored, entry in tensors.items():
        name = _SAVED_NORM.sub(r"\1.kv_norm.weight", stored)
        if name in known:
            raise CheckpointError(f"tensors {known[name].stored_name} and {stored} are the same one", param=stored)
        known[name] = entry
    return known


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        present = {path.name for path in directory.iterdir() if path.is_file()}
        missing = [name for name in names if name not in present]
        if missing:
            raise CheckpointError(f"{index}: shard {missing[0]} does not exist", param=missing[0])
        return [directory / name for name in names]
    if (directory / _SINGLE_FILE).exists():
        return [directory / _SINGLE_FILE]
    other = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
    hint = f"; {other[0]} is not read: only safetensors files are" if other else ""
    raise CheckpointError(f"{directory}: no {_SINGLE_FILE} and no {INDEX_FILE}{hint}", param=_SINGLE_FILE)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error!r}", param=index.name) from error
    bad = [v for v in weight_map.values() if not isinstance(v, str) or Path(v).name != v]
    if bad:
        raise CheckpointError(f"{index}: {bad[0]!r} is not a file name", param=index.name)
    return weight_map


def _check_index(directory: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Every tensor of the index is in the shard that it names."""
    index = directory / INDEX_FILE
    if not index.exists():
        return
    for name, shard in _weight_map(index).items():
        if name not in tensors or tensors[name].shard.name != shard:
            raise CheckpointError(f"{index}: tensor {name} is not in {shard}", param=name)


def _read_header(shard: Path) -> dict[str, TensorEntry]:
    try:
        with safe_open(shard, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {n: TensorEntry(shard, n, str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: not a readable safetensors file: {error}", param=shard.name) from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """A stable hash of config and weights for cache namespaces, cheap for any size.

    Covers config.json, every tensor's name, dtype and shape, and of each shard its size and 64 evenly spaced 4 KiB
    samples: two sets of trained weights differ in every sample. Shard names and places do not matter.
    """
    digest = hashlib.sha256((checkpoint.directory / "config.json").read_bytes())
    for name in sorted(checkpoint.tensors):
        entry = checkpoint.tensors[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    for shard in sorted(_shard_digest(shard) for shard in {entry.shard for entry in checkpoint.tensors.values()}):
        digest.update(shard)
    return digest.hexdigest()


def _shard_digest(shard: Path) -> bytes:
    size = shard.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with shard.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
