"""`thalweg inspect`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import run, run_alone
from tests.model.fields import FLASH_LIKE
from thalweg.cli.inspect import FORMATS, LENGTHS
from thalweg.config.options import parse_bytes


def facts(model: str, memory: str = "16GiB") -> dict[str, Any]:
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
        assert form["bytes_per_token_total"] == pytest.approx(sum(per_token.values()))
        assert round(form["bytes_at_1m_tokens"] / 2**30, 2) == total
        assert form["window_bytes_if_stored_per_token"] == window
        assert round(form["checkpoint_bytes"]["window"] / 2**20, 2) == checkpoint
    rows = {name: (form["row_bytes"], form["row_padding_bytes"]) for name, form in seen["formats"].items()}
    assert rows["fp8, fp4 index"] == ({"kv": 584, "index": 68}, {"kv": 1, "index": 0})
    assert rows["fp8, fp8 index"] == ({"kv": 584, "index": 132}, {"kv": 1, "index": 0})
    assert seen["exact_replay_tokens"] == replay
    assert (seen["layer_kinds"].count("csa"), seen["layer_kinds"].count("hca")) == compressed
    if model == "pro":
        assert round(seen["formats"]["bfloat16"]["bytes_at_1m_tokens"] / 2**30, 2) == 9.62


def test_published_models_have_their_published_sizes() -> None:
    """DeepSeek-V4 report: Flash 284B with 13B active, Pro 1.6T with 49B active."""
    for model, total, active in (("flash", 284e9, 13e9), ("pro", 1.6e12, 49e9)):
        seen = facts(model)
        assert seen["parameters"] == pytest.approx(total, rel=0.02)  # "1.6T" is rounded
        assert seen["active_parameters"] == pytest.approx(active, rel=0.07)  # the embedding table is counted here
        assert seen["max_position_embeddings"] == 1 << 20


def test_sequences_that_fit_without_prefix_caching_are_a_division() -> None:
    form = facts("flash", "80GiB")["formats"]["fp8, fp4 index"]
    for tokens, count in form["sequences_that_fit_without_prefix_caching"].items():
        each = form["fixed_bytes_per_request_total"] + form["bytes_per_token_total"] * int(tokens)
        assert count == int(80 * 2**30 // each) >= form["sequences_that_fit"][tokens] > 0
    assert sum(form["fixed_bytes_per_request"].values()) == form["fixed_bytes_per_request_total"]


@pytest.mark.parametrize("model", ["flash", "pro", "default"])
def test_the_table_is_whole(model: str) -> None:
    """Every number of the JSON form that a person wants, on lines that are not cut."""
    text = run("inspect", model, "--memory", "141.5GiB")
    seen = facts(model, "141.5GiB")
    assert all(len(line) <= 120 for line in text.splitlines()) and "…" not in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    table = {row[0]: row[1:] for row in rows}
    forms = [seen["formats"][name] for name in FORMATS]
    for key, remark in (("", ""), ("_without_prefix_caching", ", no prefix caching")):
        for length in LENGTHS:
            cells = table[f"sequences of {length // 1024}K in 141.5 GiB{remark}"]
            assert cells == [f"{form['sequences_that_fit' + key][str(length)]:,}" for form in forms]
    for kind in ("kv", "index"):
        assert table[f"{kind} row"] == [f"{form['row_bytes'][kind]:,}" for form in forms]
        assert table[f"padding in a {kind} row"] == [str(form["row_padding_bytes"][kind]) for form in forms]
    for group in seen["formats"]["bfloat16"]["bytes_per_token"]:
        assert table[f"{group} per token"] == [f"{form['bytes_per_token'][group]:,.1f}" for form in forms]
    assert f"{seen['parameters']:,}" in text and f"{seen['exact_replay_tokens']:,} tokens" in text


def test_inspect_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['thalweg', 'inspect', 'pro', *sys.argv[1:]]\n"
        "from thalweg.cli.main import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    for flags in (["--json"], []):
        result = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "AssertionError" not in result.stderr, result.stderr


def test_what_can_be_inspected(tmp_path: Path) -> None:
    """The embedded model by default, a directory, a config.json; no weights are needed."""
    assert run("inspect", "--json") == run("inspect", "default", "--json")
    assert "2 window, 1 hca, 1 csa" in run("inspect")
    (tmp_path / "config.json").write_text(json.dumps(FLASH_LIKE))
    assert facts(str(tmp_path)) == facts(str(tmp_path / "config.json"))
    assert "order: 2 x window, csa, hca, csa" in run("inspect", str(tmp_path))
    assert "order: 2 x window, 20 x (csa hca), csa" in run("inspect", "flash")


@pytest.mark.parametrize("kinds", [[0], [0, 0, 0], [4], [128, 128]])
def test_models_of_one_kind_of_layer(tmp_path: Path, kinds: list[int]) -> None:
    fields = {**FLASH_LIKE, "num_hidden_layers": len(kinds), "compress_ratios": kinds, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    seen = facts(str(tmp_path))
    assert seen["layers"] == len(kinds) and seen["mtp_parameters"] == 0
    assert (seen["formats"]["float32"]["bytes_per_token_total"] > 0) is any(kinds)
    assert run("inspect", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["falsh"], "Did you mean 'flash'"),
        (["x" * 5000], "File name too long"),
        (["flash", "--memory", "big"], "memory: 'big' is not a number of bytes"),
        (["flash", "--memory", "9" * 400 + "GiB"], "memory"),
        (["--memroy", "1GiB"], "--memory"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    assert words in run("inspect", *arguments, ok=False)


def test_mistakes_in_a_config_are_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**FLASH_LIKE, "o_groups": 3}))
    message = "thalweg: config.json: o_groups must divide num_attention_heads\n"
    assert run_alone("inspect", str(tmp_path), ok=False) == run("inspect", str(tmp_path), ok=False) == message


def test_memory_is_read_as_options_are() -> None:
    assert facts("flash", "1.5TiB")["memory_bytes"] == parse_bytes("1536GiB", "memory") == 3 * 2**39
    assert facts("flash", "1")["formats"]["float32"]["sequences_that_fit"] == {str(n): 0 for n in LENGTHS}


def test_version_is_instant_and_imports_no_torch() -> None:
    code = "import sys; from thalweg.cli.main import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert run_alone("--version").startswith("thalweg 0.")
