"""Engine options: file, then environment, then flags; unknown names and values out of range are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thalweg.config.options import EngineOptions, load_options, parse_bytes, profile_names
from thalweg.errors import ConfigError


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('max-num-seqs = 3\nkv_cache_memory = "2GiB"\nthreads = 1\n')
    environment = {"THALWEG_MAX_NUM_SEQS": "4", "THALWEG_ENABLE_PREFIX_CACHING": "false", "HOME": "x"}
    options = load_options({"threads": 2, "dtype": None}, file=file, environment=environment)
    assert (options.max_num_seqs, options.threads, options.kv_cache_memory) == (4, 2, 2 * 2**30)
    assert options.enable_prefix_caching is False and options.dtype == "auto"


def test_the_variable_of_the_servers_key_is_no_engine_option() -> None:
    assert load_options({}, environment={"THALWEG_API_KEY": "a key"}) == EngineOptions()


def test_few_options() -> None:
    assert len(EngineOptions.__dataclass_fields__) <= 30


@pytest.mark.parametrize(
    ("flags", "param", "words"),
    [
        ({"max_num_seq": 3}, "max_num_seq", "Did you mean 'max_num_seqs'"),
        ({"max_num_seqs": 0}, "max_num_seqs", "least allowed value 1"),
        ({"max_num_seqs": "many"}, "max_num_seqs", "whole number"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 64}, "max_num_batched_tokens", "above max_num_seqs"),
        ({"dtype": "int4"}, "dtype", "auto, float32, bfloat16"),
        ({"chat_encoding": "new"}, "chat_encoding", "preview, later"),
        ({"enable_prefix_caching": "maybe"}, "enable_prefix_caching", "true or false"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory", "4GiB"),
        ({"checkpoint_interval": -1}, "checkpoint_interval", "below 0"),
        ({"kv-cache-memory": "1GiB"}, "kv-cache-memory", "Did you mean 'kv_cache_memory'"),
        ({"zzzzzz": 1}, "zzzzzz", r"unknown option 'zzzzzz'\.$"),
        ({"threads": 0}, "threads", "least allowed value 1"),
        ({"max_model_len": -5}, "max_model_len", "least allowed value 1"),
        ({"max_waiting": 0}, "max_waiting", "least allowed value 1"),
        ({"max_queue_seconds": 0}, "max_queue_seconds", "not above 0"),
        ({"max_queue_seconds": "nan"}, "max_queue_seconds", "not above 0"),
        ({"max_queue_seconds": "soon"}, "max_queue_seconds", "not a number"),
        ({"kv_cache_memory": 0}, "kv_cache_memory", "least allowed value 1"),
        ({"kv_cache_memory": True}, "kv_cache_memory", "4GiB"),
        ({"kv_cache_memory": -1}, "kv_cache_memory", "4GiB"),
        ({"max_num_seqs": 3.7}, "max_num_seqs", "3.7 is not a whole number"),
        ({"max_num_seqs": float("inf")}, "max_num_seqs", "whole number"),
        ({"max_num_seqs": True}, "max_num_seqs", "whole number"),
        ({"max_num_seqs": [1]}, "max_num_seqs", "whole number"),
        ({"device": "tpu"}, "device", "auto, cpu, cuda"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype", "auto, float32, bfloat16, fp8$"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype", "auto, float32, bfloat16, fp8$"),
        ({"index_cache_dtype": "int8"}, "index_cache_dtype", "auto, float32, bfloat16, fp8, fp4$"),
        ({"model": {"path": "x"}}, "model", "not a text"),
        ({"window_policy": "bounded"}, "window_policy", "Did you mean 'boundary'|Did you mean 'bounded-replay'"),
        ({"window_policy": "interval:0"}, "window_policy", "interval:K"),
        ({"window_policy": "interval"}, "window_policy", "interval:K"),
        ({"kv_disk_space": "much"}, "kv_disk_space", "4GiB"),
        ({"kv_disk_dir": ""}, "kv_disk_dir", "empty"),
        ({"shadow_rate": 1.5}, "shadow_rate", "between 0 and 1"),
        ({"shadow_rate": "often"}, "shadow_rate", "not a number"),
    ],
)
def test_wrong_options_are_named(flags: dict, param: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_options(flags, environment={})
    assert caught.value.param == param


def test_variables_are_checked_as_flags_are() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'max_num_seqs'"):
        load_options({}, environment={"THALWEG_MAX_NUM_SEQ": "3"})
    with pytest.raises(ConfigError, match="whole number"):
        load_options({}, environment={"THALWEG_THREADS": ""})
    assert load_options({}, environment={"THALWEG_MODEL": "m", "THALWEGS": "x", "PATH": "x"}) == EngineOptions(
        model="m"
    )


def test_every_option_can_be_set_in_every_place(tmp_path: Path) -> None:
    given: dict[str, object] = {
        "model": "m", "served_model_name": "n", "device": "cpu", "dtype": "float32", "kv_cache_dtype": "bfloat16",
        "index_cache_dtype": "fp4", "quantization_simulation": True, "deterministic": True, "kernels": "plain",
        "max_model_len": 99, "max_num_seqs": 3, "max_num_batched_tokens": 77,
        "kv_cache_memory": 2**30, "enable_prefix_caching": False, "checkpoint_interval": 0, "chat_encoding": "later",
        "max_waiting": 5, "threads": 1, "window_policy": "interval:4096", "kv_host_memory": 2**20, "kv_disk_dir": "d",
        "kv_disk_space": 2**25, "shadow_rate": 0.25, "max_queue_seconds": 2.5,
        "memory_utilization": 0.5, "kv_host_ratio": 2.0,
    }  # fmt: skip
    wanted = EngineOptions(**given)
    assert set(given) == set(EngineOptions.__dataclass_fields__)
    assert all(getattr(EngineOptions(), name) != value for name, value in given.items())
    assert load_options(given, environment={}) == wanted
    assert load_options({}, environment={f"THALWEG_{k.upper()}": str(v) for k, v in given.items()}) == wanted
    lines = (f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in given.items())
    (tmp_path / "engine.toml").write_text("\n".join(lines))
    assert load_options({}, file=tmp_path / "engine.toml", environment={}) == wanted


def test_other_engines_words_for_formats() -> None:
    options = load_options({"kv_cache_dtype": "fp8_e4m3", "index_cache_dtype": "bf16"}, environment={})
    assert (options.kv_cache_dtype, options.index_cache_dtype) == ("fp8", "bfloat16")


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("ON", True), ("1", True), ("no", False), (" off ", False)])
def test_booleans(word: str, value: bool) -> None:
    assert load_options({"quantization_simulation": word}, environment={}).quantization_simulation is value


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load_options({}, file=tmp_path / "absent.toml", environment={})
    (tmp_path / "bad.toml").write_text("x = [")
    with pytest.raises(ConfigError, match="bad"):
        load_options({}, file=tmp_path / "bad.toml", environment={})
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bytes\.toml"):
        load_options({}, file=tmp_path / "bytes.toml", environment={})
    with pytest.raises(ConfigError, match="--config"):
        load_options({}, file=tmp_path, environment={})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1024", 1024),
        ("4GiB", 4 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5g", 3 * 2**29),
        ("2tib", 2**41),
        (7, 7),
        ("9007199254740993", 2**53 + 1),
        (" 0.5 KiB ", 512),
        ("1TB", 10**12),
        ("0", 0),
    ],
)
def test_byte_counts(text: str | int, count: int) -> None:
    assert parse_bytes(text, "x") == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "1XB", "-1", "1,5GB", "1e9", "nan", "1 2", "9" * 400, "\u0663GiB", None, True]
)
def test_what_is_no_byte_count(text: object) -> None:
    with pytest.raises(ConfigError, match=r"memory: .* is not a number of bytes") as caught:
        parse_bytes(text, "memory")  # type: ignore[arg-type]
    assert caught.value.param == "memory"


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_is_a_file_of_options_and_everything_else_goes_over_it(name: str, tmp_path: Path) -> None:
    plain, own = load_options({}, environment={}), load_options({}, profile=name, environment={})
    assert own != plain and own.model == plain.model
    file = tmp_path / "own.toml"
    file.write_text("max-num-seqs = 3")
    assert load_options({}, profile=name, file=file, environment={}).max_num_seqs == 3
    assert load_options({"max_num_seqs": 5}, profile=name, file=file, environment={}).max_num_seqs == 5


def test_there_is_a_profile_for_each_shape_of_traffic() -> None:
    assert profile_names() == ["coding-agents", "long-agents", "mixed", "rollouts", "short-chat"]
    with pytest.raises(ConfigError, match="Did you mean 'short-chat'"):
        load_options({}, profile="short-cat", environment={})
