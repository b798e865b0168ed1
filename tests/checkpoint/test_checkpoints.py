"""Checkpoints on disk: round trips through every layout and format, and every way in which one can be wrong."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from tests.model.fields import FLASH_LIKE, GEOMETRIES
from tests.model.paging import PagedSequences
from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.parameters import parameters
from thalweg.checkpoint.random_model import random_parameters
from thalweg.checkpoint.reader import CheckpointLayout, fingerprint, open_checkpoint
from thalweg.checkpoint.writer import WriteFormat, write_checkpoint
from thalweg.config.model_parse import parse_model_config, read_config_json
from thalweg.errors import CheckpointError, ConfigError
from thalweg.kernels.registry import reference_kernels
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model
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


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
@pytest.mark.parametrize("shard", [10**9, 40_000])
def test_official_layout_round_trip(tmp_path: Path, name: str, shard: int) -> None:
    fields = GEOMETRIES[name]
    tensors = load(write(tmp_path / "m", fields, max_shard_bytes=shard))
    for parameter, value in random_parameters(parse_model_config(fields), 0):
        assert torch.equal(tensors[parameter.name], value), parameter.name
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) is (shard < 10**9)


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_transformers_layout_is_what_transformers_reads(tmp_path: Path, name: str) -> None:
    fields = GEOMETRIES[name]
    directory = write(tmp_path / "m", fields, layout=CheckpointLayout.TRANSFORMERS)
    theirs, report = DeepseekV4ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.num_mtp_layers == 0
    model = Model(checkpoint.config, load(directory), Numerics(), reference_kernels())
    tokens = torch.arange(140) % 97
    cache = PagedSequences(checkpoint.config, 1, 140)
    with torch.inference_mode():
        ours = model.forward(cache.inputs([(0, 0, tokens.tolist())]), cache)
        assert (ours - theirs(tokens[None]).logits[0]).abs().max() < 1e-4


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", layout=CheckpointLayout.TRANSFORMERS)
    DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    ours, theirs = open_checkpoint(directory), open_checkpoint(tmp_path / "saved")
    assert ours.config == theirs.config
    first, second = load(directory), load(tmp_path / "saved")
    assert all(torch.equal(first[name], second[name]) for name in first)


def plain_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """model-spec section 5, element by element."""
    result = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            exponent = int(scale.view(torch.uint8)[i // 128, j // 128]) - 127
            result[i, j] = float(weight[i, j].float()) * 2.0**exponent
    return result


def plain_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    rows, half = packed.shape
    result = torch.empty(rows, 2 * half)
    for i in range(rows):
        for j in range(2 * half):
            byte = int(packed[i, j // 2]) & 0xFF
            code = byte & 15 if j % 2 == 0 else byte >> 4
            value = table[code & 7] * (-1 if code & 8 else 1)
            result[i, j] = value * 2.0 ** (int(scale.view(torch.uint8)[i, j // 32]) - 127)
    return result


def test_quantized_official_layout(tmp_path: Path) -> None:
    """Dequantised values equal the plain reading of the stored bytes, and lie near what was written."""
    directory = write(tmp_path / "m", QUANTIZED, quantize=True, plain=torch.bfloat16)
    tensors, stored = load(directory), load_file(directory / "model.safetensors")
    attention = "layers.0.attn.wq_a"
    weight = stored[f"{attention}.weight"]
    assert weight.dtype == torch.float8_e4m3fn and stored[f"{attention}.scale"].shape == (1, 2)
    assert torch.equal(tensors[f"{attention}.weight"], plain_fp8(weight, stored[f"{attention}.scale"]))
    expert = "layers.2.ffn.experts.3"
    up = plain_fp4(stored[f"{expert}.w3.weight"], stored[f"{expert}.w3.scale"])
    assert torch.equal(tensors["layers.2.ffn.experts.gate_up"][3, 64:], up)
    for parameter, value in random_parameters(parse_model_config(QUANTIZED), 0):
        error = (tensors[parameter.name] - value).abs().max()
        limit = {"matrix": 0.07, "expert": 0.3}.get(parameter.storage.value, 0.01)
        assert error <= limit * value.abs().max().clamp_min(1), parameter.name


def test_fp8_experts_and_e8m0_as_bytes(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", QUANTIZED, quantize=True)
    path = directory / "model.safetensors"
    stored = load_file(path)
    name = "layers.1.ffn.experts.0.w2"
    values = torch.randn(160, 64).to(torch.float8_e4m3fn)
    stored[f"{name}.weight"] = values
    stored[f"{name}.scale"] = torch.tensor([[130], [120]], dtype=torch.uint8)
    save_file(stored, path)
    expected = plain_fp8(values, stored[f"{name}.scale"])
    assert torch.equal(load(directory)["layers.1.ffn.experts.down"][0], expected)
    assert math.isclose(float(expected[0, 0]), float(values[0, 0].float()) * 8)


def edited(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return directory


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.1.attn.wkv.weight"), ["missing", "layers.1.attn.wkv.weight"]),
        (lambda t: t.pop("mtp.0.enorm.weight"), ["missing", "mtp.0.enorm.weight"]),
        (lambda t: t.update({"layers.9.x": torch.zeros(1)}), ["not a tensor of this model", "layers.9.x"]),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), ["norm.weight", "[3]", "[48]"]),
        (lambda t: t.update({"norm.weight": torch.zeros(48, dtype=torch.int64)}), ["norm.weight", "I64"]),
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


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".ffn.experts." in n]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"90 tensors missing: .*and 80 more"):
        load(edited(write(tmp_path / "m"), drop))


def test_duplicates_in_the_mtp_block_are_skipped(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mtp.0.emb.tok_emb.weight"] = torch.zeros(97, 48)
        tensors["mtp.0.head.weight"] = torch.zeros(97, 48)

    load(edited(write(tmp_path / "m"), add))


def test_broken_files_are_named(tmp_path: Path) -> None:
    single = write(tmp_path / "single")
    data = (single / "model.safetensors").read_bytes()
    (single / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(single)
    (single / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(single)
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read"):
        load(single)
    (single / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(single)


def test_broken_indices_are_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", max_shard_bytes=100_000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = sorted(index["weight_map"].items())[0]
    for place, words in (
        ("absent.safetensors", "absent"),
        ("../m/x.safetensors", "not a file name"),
        (7, "not a file"),
    ):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: place}}))
        with pytest.raises(CheckpointError, match=words):
            load(directory)
    other = next(s for s in index["weight_map"].values() if s != shard)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: other}}))
    with pytest.raises(CheckpointError, match=f"{name} is not in {other}"):
        load(directory)
    tensors = load_file(directory / other)
    save_file({**tensors, name: torch.zeros(1)}, directory / other)
    with pytest.raises(CheckpointError, match=f"{name} is in"):
        load(directory)


def test_a_half_written_checkpoint_never_appears(tmp_path: Path) -> None:
    def values():
        for i, pair in enumerate(random_parameters(parse_model_config(FLASH_LIKE), 0)):
            if i == 40:
                raise RuntimeError("no more")
            yield pair

    with pytest.raises(RuntimeError, match="no more"):
        write_checkpoint(tmp_path / "m", FLASH_LIKE, values(), WriteFormat(max_shard_bytes=20_000))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "m")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        write(tmp_path / "m")


def test_fingerprints(tmp_path: Path) -> None:
    first = fingerprint(open_checkpoint(write(tmp_path / "a")))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert fingerprint(open_checkpoint(tmp_path / "copy")) == first
    assert fingerprint(open_checkpoint(write(tmp_path / "b", seed=1))) != first
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "index_topk": 25}))
    assert fingerprint(open_checkpoint(tmp_path / "copy")) != first


PEAK_OF_LOADING = """
import sys, threading, time
from pathlib import Path
import psutil, torch
from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.model.weights import allocate
checkpoint = open_checkpoint(Path(sys.argv[1]))
tensors = allocate(checkpoint.config, torch.bfloat16, torch.device("cpu"))
size = sum(t.numel() * t.element_size() for t in tensors.values())
process, peak, done = psutil.Process(), 0, False
before = process.memory_info().rss
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
load_parameters(checkpoint, tensors)
done = True
thread.join()
print(peak - before, size)
"""


def test_loading_needs_the_weights_and_one_shard(tmp_path: Path) -> None:
    shard = 16 * 2**20
    fields = {
        **FLASH_LIKE,
        "vocab_size": 60_000,
        "hidden_size": 256,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 8,
    }
    directory = write(tmp_path / "m", fields, plain=torch.bfloat16, max_shard_bytes=shard)
    assert len(list(directory.glob("*.safetensors"))) >= 5
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(directory)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, size = map(int, output.split())
    largest = max(p.elements for p in parameters(parse_model_config(fields))) * 2
    slack = 12 * 2**20
    assert size > 80 * 2**20
    assert peak <= size + max(shard, largest) + slack, (peak, size)


@pytest.mark.parametrize(
    ("model", "kinds", "expert", "mixing"),
    [
        ("flash", {"window": 107.0, "csa": 126.1, "hca": 111.2}, 25.2, 0.79),
        ("pro", {"csa": 331.3, "hca": 307.3}, 66.1, 1.38),
    ],
)
def test_published_sizes_per_layer(model: str, kinds: dict[str, float], expert: float, mixing: float) -> None:
    """model-spec section 6, in millions of parameters."""
    config = parse_model_config(read_config_json(model))
    table = parameters(config)
    for kind, millions in kinds.items():
        layer = config.layer_kinds.index(kind)
        size = sum(p.elements for p in table if p.name.startswith(f"layers.{layer}.attn.")) / 1e6
        assert size == pytest.approx(millions, abs=0.06)
    experts = sum(p.elements for p in table if p.name.startswith("layers.5.ffn.experts.")) / config.num_experts / 1e6
    assert experts == pytest.approx(expert, abs=0.06)
    mix = sum(p.elements for p in table if p.name.startswith("layers.5.hc_")) / 1e6
    assert mix == pytest.approx(mixing, abs=0.01)
