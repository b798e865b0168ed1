"""Engine options: file, then environment, then flags; unknown names and values out of range are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from thalweg.config.options import EngineOptions, load_options, parse_bytes
from thalweg.errors import ConfigError


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('max-num-seqs = 3\nkv_cache_memory = "2GiB"\nthreads = 1\n')
    environment = {"THALWEG_MAX_NUM_SEQS": "4", "THALWEG_ENABLE_PREFIX_CACHING": "false", "HOME": "x"}
    options = load_options({"threads": 2, "dtype": None}, file=file, environment=environment)
    assert (options.max_num_seqs, options.threads, options.kv_cache_memory) == (4, 2, 2 * 2**30)
    assert options.enable_prefix_caching is False and options.dtype == "auto"


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
    ],
)
def test_wrong_options_are_named(flags: dict, param: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_options(flags, environment={})
    assert caught.value.param == param


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load_options({}, file=tmp_path / "absent.toml", environment={})
    (tmp_path / "bad.toml").write_text("x = [")
    with pytest.raises(ConfigError, match="bad"):
        load_options({}, file=tmp_path / "bad.toml", environment={})


@pytest.mark.parametrize(
    ("text", "count"),
    [("1024", 1024), ("4GiB", 4 * 2**30), ("500 MB", 500 * 10**6), ("1.5g", 3 * 2**29), ("2tib", 2**41), (7, 7)],
)
def test_byte_counts(text: str | int, count: int) -> None:
    assert parse_bytes(text, "x") == count
