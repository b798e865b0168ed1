"""Fingerprints: what keeps a cache of one model away from another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.files import edited, write
from tests.model.fields import FLASH_LIKE
from thalweg.checkpoint.reader import INDEX_FILE, fingerprint, open_checkpoint


def mark(directory: Path) -> str:
    return fingerprint(open_checkpoint(directory))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "m", plain=torch.bfloat16)


def test_copies_are_the_same(model: Path, tmp_path: Path) -> None:
    first = mark(model)
    assert mark(model) == first
    assert mark(shutil.copytree(model, tmp_path / "elsewhere")) == first
    (model / "README.md").write_text("notes")
    assert mark(model) == first


def test_shard_names_and_their_order_do_not_matter(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", max_shard_bytes=100_000)
    first = mark(directory)
    index = json.loads((directory / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    names = {shard: f"part-{len(shards) - i}.safetensors" for i, shard in enumerate(shards)}
    for shard, name in names.items():
        (directory / shard).rename(directory / name)
    (directory / INDEX_FILE).write_text(
        json.dumps({"weight_map": {t: names[s] for t, s in index["weight_map"].items()}})
    )
    assert len(shards) > 3 and mark(directory) == first


def test_the_sizes_of_shards_count(tmp_path: Path) -> None:
    marks = {mark(write(tmp_path / str(size), max_shard_bytes=size)) for size in (10**9, 100_000, 150_000)}
    assert len(marks) == 3


def test_any_change_shows(model: Path, tmp_path: Path) -> None:
    marks = [mark(model), mark(write(tmp_path / "seed", plain=torch.bfloat16, seed=1)), mark(write(tmp_path / "dtype"))]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "index_topk": 25}))
    marks.append(mark(model))
    assert len(set(marks)) == 4


def test_every_weight_of_a_small_file_counts(tmp_path: Path) -> None:
    """64 samples of 4 KiB cover a file of up to 256 KiB without a gap."""
    fields = {**FLASH_LIKE, "num_hidden_layers": 1, "compress_ratios": [4], "num_nextn_predict_layers": 0}
    model = write(tmp_path / "m", fields, plain=torch.bfloat16)
    assert (model / "model.safetensors").stat().st_size <= 64 * 4096
    marks = {mark(model)}
    names = list(load_file(model / "model.safetensors"))
    for name in names:
        edited(model, lambda tensors, name=name: tensors[name].view(-1)[-1].add_(1))
        marks.add(mark(model))
    assert len(marks) == len(names) + 1
