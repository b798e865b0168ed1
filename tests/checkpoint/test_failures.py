"""Every way in which a checkpoint can be wrong is an error that names the tensor or the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.files import edited, load, write
from tests.model.fields import FLASH_LIKE
from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.reader import INDEX_FILE, CheckpointLayout, open_checkpoint
from thalweg.errors import CheckpointError, ConfigError
from thalweg.model.weights import allocate


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.1.attn.wkv.weight"), ["1 tensors missing", "layers.1.attn.wkv.weight"]),
        (lambda t: t.pop("mtp.0.enorm.weight"), ["missing", "mtp.0.enorm.weight"]),
        (lambda t: t.update({"layers.9.x": torch.zeros(1)}), ["not a tensor of this model", "layers.9.x"]),
        (lambda t: t.update({"mtp.0.other.weight": torch.zeros(1)}), ["not a tensor", "mtp.0.other.weight"]),
        (lambda t: t.update({"layers.0.atn.wkv.weight": torch.zeros(1)}), ["mean 'layers.0.attn.wkv.weight'"]),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), ["norm.weight", "[3]", "[48]"]),
        (lambda t: t.update({"norm.weight": torch.zeros(())}), ["norm.weight", "[]", "[48]"]),
        (lambda t: t.update({"norm.weight": torch.zeros(48, dtype=torch.int64)}), ["norm.weight", "I64"]),
        (lambda t: t.update({"norm.weight": torch.zeros(48, dtype=torch.float64)}), ["norm.weight", "F64"]),
        (lambda t: t.update({"norm.weight": torch.zeros(48).to(torch.float8_e4m3fn)}), ["norm.weight", "F8_E4M3"]),
        (lambda t: t.update({"layers.0.ffn.gate.tid2eid": torch.zeros(97, 2)}), ["tid2eid", "F32", "I32 or I64"]),
        (lambda t: t["layers.0.ffn.gate.tid2eid"].fill_(5), ["tid2eid", "outside 0 to 4"]),
        (lambda t: t["layers.0.ffn.gate.tid2eid"][-1, -1].fill_(-1), ["tid2eid", "outside 0 to 4"]),
        (lambda t: t.pop("embed.weight"), ["neither embed.weight", "model.embed_tokens.weight"]),
        (
            lambda t: t.update({"layers.0.attn.wq_a.weight": torch.zeros(24, 48).to(torch.float8_e4m3fn)}),
            ["layers.0.attn.wq_a.scale", "missing"],
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable, words: list[str]) -> None:
    directory = edited(write(tmp_path / "m"), change)
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.param and caught.value.param in caught.value.message


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".ffn.experts." in n]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"90 tensors missing: .*and 80 more") as caught:
        load(edited(write(tmp_path / "m"), drop))
    assert caught.value.message.count(".ffn.experts.") == 10


def test_nothing_is_written_before_all_names_and_shapes_are_right(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(edited(write(tmp_path / "m"), lambda t: t.pop("norm.weight")))
    tensors = allocate(checkpoint.config, torch.float32, torch.device("cpu"))
    for tensor in tensors.values():
        tensor.fill_(3)
    with pytest.raises(CheckpointError):
        load_parameters(checkpoint, tensors)
    assert all((tensor == 3).all() for tensor in tensors.values())


def test_duplicates_in_the_mtp_block_are_skipped(tmp_path: Path) -> None:
    extra = {"mtp.0.emb.tok_emb.weight": torch.zeros(97, 48), "mtp.0.head.weight": torch.zeros(97, 48)}
    directory = edited(write(tmp_path / "m"), lambda t: t.update(extra))
    assert load(directory)["embed.weight"].any()
    checkpoint = open_checkpoint(directory)
    report = load_parameters(checkpoint, allocate(checkpoint.config, torch.float32, torch.device("cpu")))
    assert report.skipped == tuple(sorted(extra))


def test_a_tensor_under_both_spellings_is_named(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.compressor.norm.weight"] = torch.zeros(32)

    directory = edited(write(tmp_path / "m", layout=CheckpointLayout.TRANSFORMERS), add)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.compressor\.\w*norm\.weight are the same"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:20],
        lambda data: b"",
        lambda data: struct.pack("<Q", 1 << 60),
        lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
    ],
)
def test_broken_shards_are_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"m/model\.safetensors: not a readable safetensors file"):
        open_checkpoint(tmp_path / "m")


def test_a_file_that_goes_away_after_opening_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_parameters(checkpoint, allocate(checkpoint.config, torch.float32, torch.device("cpu")))


def test_directories_without_weights_are_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no model\.safetensors\.index\.json$"):
        open_checkpoint(directory)
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read: only safetensors"):
        open_checkpoint(directory)
    with pytest.raises(CheckpointError, match=r"config\.json: not a directory with a checkpoint"):
        open_checkpoint(directory / "config.json")
    with pytest.raises(CheckpointError, match="flash is a config without weights"):
        open_checkpoint(Path("flash"))
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(directory)
    shutil.rmtree(directory)
    with pytest.raises(ConfigError, match="no such model directory"):
        open_checkpoint(directory)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sharded") / "m", max_shard_bytes=100_000)


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "m"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("absent.safetensors", r"shard absent\.safetensors does not exist"),
        ("../m/model-00001-of-00005.safetensors", "is not a file name"),
        ("/model-00001-of-00005.safetensors", "is not a file name"),
        ("..", "shard .. does not exist"),
        ("", "shard  does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "does not exist"),
        (7, "7 is not a file name"),
        (["a"], "is not a file name"),
    ],
)
def test_index_with_a_wrong_place(copied: Path, place: Any, words: str) -> None:
    path = copied / INDEX_FILE
    index = json.loads(path.read_text())
    name = min(index["weight_map"])
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: place}}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(copied)


def test_tensors_that_are_not_where_the_index_says(copied: Path) -> None:
    path = copied / INDEX_FILE
    index = json.loads(path.read_text())
    name, shard = sorted(index["weight_map"].items())[0]
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "extra": shard}}))
    with pytest.raises(CheckpointError, match=f"tensor extra is not in {shard}"):
        open_checkpoint(copied)
    other = next(s for s in index["weight_map"].values() if s != shard)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: other}}))
    with pytest.raises(CheckpointError, match=f"{name} is not in {other}"):
        open_checkpoint(copied)
    save_file({**load_file(copied / other), name: torch.zeros(1)}, copied / other)
    with pytest.raises(CheckpointError, match=f"tensor {name} is in .* and in "):
        open_checkpoint(copied)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_an_index_of_any_json_is_an_error_that_names_it(tmp_path_factory: pytest.TempPathFactory, index: Any) -> None:
    directory = tmp_path_factory.mktemp("any")
    (directory / "config.json").write_text(json.dumps(FLASH_LIKE))
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_checkpoint(directory)
