"""`thalweg inspect` and `thalweg new-model`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, ok: bool = True) -> str:
    result = subprocess.run([sys.executable, "-m", "thalweg", *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) is ok, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if ok else result.stderr


def facts(model: str, memory: str = "16GiB") -> dict:
    return json.loads(run("inspect", model, "--memory", memory, "--json"))


@pytest.mark.parametrize(
    ("model", "fp8", "fp4", "compressed", "window", "checkpoint", "replay"),
    [
        ("pro", (4521, 990, 5.38), (4521, 510, 4.91), (30, 31), 35624, 4.35, 7808),
        ("flash", (3157, 693, 3.76), (3157, 357, 3.43), (21, 20), 25112, 3.07, 5504),
    ],
)
def test_the_published_byte_table(model, fp8, fp4, compressed, window, checkpoint, replay) -> None:
    """The table "Bytes" of the mission, per token and at 1M tokens in GiB."""
    seen = facts(model)
    for name, (rows, index, total) in (("fp8, fp8 index", fp8), ("fp8, fp4 index", fp4)):
        form = seen["formats"][name]
        per_token = form["bytes_per_token"]
        assert round(per_token["csa"] + per_token["hca"]) == rows
        assert round(per_token["index"]) == index
        assert round(form["bytes_at_1m_tokens"] / 2**30, 2) == total
        assert form["window_bytes_if_stored_per_token"] == window
        assert round(form["checkpoint_bytes"]["window"] / 2**20, 2) == checkpoint
    assert seen["exact_replay_tokens"] == replay
    assert (seen["layer_kinds"].count("csa"), seen["layer_kinds"].count("hca")) == compressed
    if model == "pro":
        assert round(seen["formats"]["bfloat16"]["bytes_at_1m_tokens"] / 2**30, 2) == 9.62


def test_sequences_that_fit() -> None:
    form = facts("flash", "80GiB")["formats"]["fp8, fp4 index"]
    for tokens, count in form["sequences_that_fit"].items():
        each = form["fixed_bytes_per_request_total"] + form["bytes_per_token_total"] * int(tokens)
        assert count == int(80 * 2**30 // each)
    assert sum(form["fixed_bytes_per_request"].values()) == form["fixed_bytes_per_request_total"]


def test_inspect_needs_no_torch_and_no_weights(tmp_path: Path) -> None:
    code = (
        "import sys; from thalweg.cli.inspect import model_facts; from thalweg.config.model_parse import "
        "load_model_config; model_facts(load_model_config('pro'), 2**34); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    text = run("inspect", "default")
    assert "2 window, 1 hca, 1 csa" in text and "sequences of 1024K in 16 GiB" in text


def test_new_model_makes_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    shape = {
        "compress_ratios": "0,4,128,4,128,4", "hidden_size": 512, "num_attention_heads": 8, "head_dim": 512,
        "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_groups": 2, "index_n_heads": 8, "index_head_dim": 128,
        "index_topk": 512, "n_routed_experts": 16, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    flags = [flag for name, value in shape.items() for flag in ("--set", f"{name}={value}")]
    run("new-model", str(tmp_path / "m"), *flags, "--vocab-size", "4096", "--scale", "0.02")
    seen = facts(str(tmp_path / "m"))
    assert seen["layer_kinds"] == ["window", "csa", "hca", "csa", "hca", "csa"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["vocab_size"]) == (512, 512, 4096)
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    "form", [[], ["--quantize"], ["--layout", "transformers", "--dtype", "float32"], ["--like", "pro"]]
)
def test_new_models_load_and_answer(tmp_path: Path, form: list[str]) -> None:
    run("new-model", str(tmp_path / "m"), "--scale", "0.005", "--layers", "4", *form)
    out = run("generate", str(tmp_path / "m"), "--prompt", "hello", "--max-tokens", "4", "--kv-cache-memory", "64MiB")
    assert out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["new-model", "{}", "--set", "index_topq=3"], "Did you mean 'index_topk'"),
        (["new-model", "{}", "--like", "flush"], "Did you mean 'flash'"),
        (["new-model", "{}", "--layout", "transformers", "--quantize"], "official layout"),
        (["new-model", "{}", "--scale", "7"], "not in (0, 1]"),
        (["new-model", "{}", "--layers", "99"], "1 to 43"),
        (["new-model", "{}", "--tokenizer", "/nonexistent"], "/nonexistent/tokenizer.json"),
        (["inspect", "falsh"], "Did you mean 'flash'"),
        (["inspect", "flash", "--memory", "big"], "memory"),
        (["inspect", "--memroy", "1GiB"], "--memory"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in run(*(a.format(tmp_path / "m") for a in arguments), ok=False)


def test_version_is_instant_and_imports_no_torch() -> None:
    code = "import sys; from thalweg.cli.main import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert run("--version").startswith("thalweg 0.")
