"""`thalweg new-model`, as a user runs it: every layout and form loads, is what inspect says, and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from tests.checkpoint.files import load
from tests.cli.commands import run, run_alone
from thalweg.checkpoint.parameters import parameters
from thalweg.checkpoint.reader import CheckpointLayout, open_checkpoint
from thalweg.cli.new_model import scaled_config
from thalweg.config.model_parse import default_model, parse_model_config

SHAPE = {
    "compress_ratios": "0,4,128,4,128,4", "hidden_size": 512, "num_attention_heads": 8, "head_dim": 512,
    "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_groups": 2, "o_lora_rank": 512, "index_n_heads": 8,
    "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 16, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "num_nextn_predict_layers": 0,
}  # fmt: skip
FEWER = {"hidden_size": 64, "head_dim": 64, "qk_rope_head_dim": 16, "q_lora_rank": 32, "moe_intermediate_size": 32}


def settings(fields: dict[str, Any]) -> list[str]:
    return [flag for name, value in fields.items() for flag in ("--set", f"{name}={value}")]


def facts(model: Path) -> dict[str, Any]:
    return json.loads(run("inspect", str(model), "--json"))


def test_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    """Six layers by --set; the full widths, about 77 M parameters, are checked from the config alone."""
    directory = tmp_path / "m"
    run("new-model", str(directory), *settings(SHAPE | FEWER), "--vocab-size", "4096", "--scale", "0.02")
    config = open_checkpoint(directory).config
    assert config.layer_kinds == ("window", "csa", "hca", "csa", "hca", "csa")
    assert (config.index_topk, config.window, config.vocab_size, config.num_experts) == (512, 128, 4096, 16)
    assert (config.hidden_size, config.head_dim, config.num_mtp_layers) == (64, 64, 0)
    assert load(directory)
    fields = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in fields and "expert_dtype" not in fields
    full = fields | {name: SHAPE[name] for name in FEWER}
    (tmp_path / "config.json").write_text(json.dumps(full))
    seen = facts(tmp_path)
    assert seen["parameters"] == pytest.approx(77e6, rel=0.05)
    assert seen["layer_kinds"] == ["window", "csa", "hca", "csa", "hca", "csa"]


@pytest.mark.parametrize(
    ("form", "like"),
    [
        ([], "flash"),
        (["--quantize"], "flash"),
        (["--layout", "transformers", "--dtype", "float32"], "flash"),
        (["--like", "pro", "--max-shard-size", "300KB"], "pro"),
    ],
)
def test_new_models_load_and_answer(tmp_path: Path, form: list[str], like: str) -> None:
    directory = tmp_path / "m"
    printed = run("new-model", str(directory), "--scale", "0.005", "--layers", "4", *form)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.layer_kinds == parse_model_config(scaled_config(like, 0.005, 4)).layer_kinds
    assert checkpoint.layout is CheckpointLayout("transformers" if "--layout" in form else "official")
    assert load(directory)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in directory.iterdir()}
    assert (len(list(directory.glob("*.safetensors"))) > 1) is ("--max-shard-size" in form)
    said = int(printed.split(": ")[1].split(" bytes")[0].replace(",", ""))
    seen = facts(directory)
    assert seen["layers"] == 4 and (seen["mtp_parameters"] > 0)
    if "--layout" not in form:
        assert seen["weight_bytes"] == pytest.approx(said, rel=0.01 if "--quantize" in form else 1e-9)
    out = run("generate", str(directory), "--prompt", "hello", "--max-tokens", "4", "--kv-cache-memory", "64MiB")
    assert out.endswith("\n")


def test_transformers_reads_its_layout(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    run("new-model", str(directory), "--scale", "0.005", "--layout", "transformers", "--layers", "5")
    model, report = DeepseekV4ForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.dtype is torch.bfloat16 and model.config.num_hidden_layers == 5
    weights = load(directory)
    assert torch.equal(
        model.get_parameter("model.layers.2.self_attn.kv_proj.weight").float(), weights["layers.2.attn.wkv.weight"]
    )


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    flags = ("--scale", "0.005", "--layers", "3", "--vocab-size", "64")
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        run("new-model", str(tmp_path / name), *flags, "--seed", seed)
    first, second, third = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second != third


@pytest.mark.parametrize("like", ["flash", "pro"])
@pytest.mark.parametrize("scale", [1e-9, 0.003, 0.02, 0.1, 0.37, 1.0])
def test_every_scale_is_a_valid_shape(like: str, scale: float) -> None:
    """From the smallest to the released widths; FP4 groups, output groups and rotations come out even."""
    config = parse_model_config(scaled_config(like, scale, 8))
    assert config.hidden_size % 32 == 0 and config.moe_intermediate_size % 32 == 0
    assert (config.head_dim & (config.head_dim - 1), config.index_head_dim & (config.index_head_dim - 1)) == (0, 0)
    assert config.expert_dtype == "fp4" and config.num_layers == 8 and parameters(config)
    if scale == 1.0:
        whole = scaled_config(like, scale, 43 if like == "flash" else 61)
        published = json.loads((default_model().parent / "configs" / f"{like}.json").read_text())
        assert parse_model_config(whole) == parse_model_config(published)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "index_topq=3"], "'index_topq' is no config field. Did you mean 'index_topk'?"),
        (["--set", "index_topk"], "write --set index_topk=VALUE"),
        (["--set", "index_topk=many"], "index_topk must be a whole number >= 1, not 'many'"),
        (["--set", "rms_norm_eps=NaN"], "rms_norm_eps must be a positive number"),
        (["--set", "compress_ratios=0,4,x"], "compress_ratios"),
        (["--set", "compress_ratios=0,4", "--set", "num_hidden_layers=4"], "compress_ratios must list 5 layers"),
        (["--set", "compress_ratios=0,4", "--set", "num_nextn_predict_layers=x"], "num_nextn_predict_layers"),
        (["--set", "num_attention_heads=7"], "o_groups must divide"),
        (["--like", "flush"], "--like: 'flush' is not one of flash, pro. Did you mean 'flash'?"),
        (["--layout", "oficial"], "Did you mean 'official'?"),
        (["--dtype", "bf16"], "--dtype"),
        (["--layout", "transformers", "--quantize"], "only the official layout"),
        (["--quantize", "--set", "hidden_size=100"], "hidden_size is 100; FP4 experts need a multiple of 32"),
        (["--quantize", "--set", "expert_dtype=fp8"], "--quantize writes fp4 experts"),
        (["--scale", "7"], "--scale: 7.0 is not in (0, 1]"),
        (["--scale", "nan"], "not in (0, 1]"),
        (["--layers", "99"], "--layers: 99 is not in 1 to 43"),
        (["--layers", "0"], "1 to 43"),
        (["--vocab-size", "0"], "vocab_size must be a whole number >= 1"),
        (["--seed", "9" * 30], "--seed"),
        (["--max-shard-size", "-1"], "max_shard_size"),
        (["--tokenizer", "/nonexistent"], "/nonexistent/tokenizer.json: cannot be read"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, flags: list[str], words: str) -> None:
    assert words in run("new-model", str(tmp_path / "m"), *flags, ok=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    message = run_alone("new-model", str(tmp_path / "m"), "--scale", "0.005", "--layers", "1", ok=False)
    assert message == f"thalweg: {tmp_path / 'm'} exists and is not an empty directory\n"
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "notes.txt"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """The tokenizer's files are copied last: a directory in the place of one stops the command after the weights."""
    source = shutil.copytree(default_model(), tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").mkdir()
    flags = ["--scale", "0.005", "--layers", "2", "--tokenizer", str(source)]
    assert "cannot be written" in run("new-model", str(tmp_path / "m"), *flags, ok=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
