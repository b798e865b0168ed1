"""Command lines of vLLM and SGLang for V4 models start this server too."""

from __future__ import annotations

import subprocess
import sys

import httpx
import psutil
import pytest

from tests.cli.commands import run
from thalweg.cli.peers import own_arguments
from thalweg.config.model_parse import default_model
from thalweg.config.options import load_options
from thalweg.engine.runtime import build_runtime
from thalweg.errors import ConfigError

VLLM = """
    --trust-remote-code --kv-cache-dtype fp8 --block-size 256 --enable-expert-parallel --tensor-parallel-size 1
    --data-parallel-size=1 --gpu-memory-utilization 0.05 --max-model-len 8192 --max-num-seqs 4
    --max-num-batched-tokens 512 --tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --enable-auto-tool-choice
    --reasoning-parser deepseek_v4 --enable-prompt-tokens-details --kv-offloading-size 0.125
    --long-prefill-token-threshold 2048 --no-enable-log-requests
"""
SGLANG = """
    --tp 1 --dp-size 1 --page-size 256 --context-length 8192 --max-running-requests 4 --chunked-prefill-size 512
    --mem-fraction-static 0.05 --swa-full-tokens-ratio 0.1 --enable-hierarchical-cache --hicache-ratio 0.5
    --hicache-write-policy write_through --tool-call-parser deepseekv4 --reasoning-parser deepseek-v4 --enable-metrics
"""


@pytest.mark.parametrize("flags", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_a_recipe_of_a_peer_starts_a_server_that_answers(flags: str) -> None:
    command = [sys.executable, "-m", "thalweg", "serve", "--port", "0", "--threads", "1", *flags.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = next((line.split()[-1] for line in server.stdout if line.startswith("ready on ")), None)
        assert url is not None, "it did not start"
        body = {"model": "thalweg-tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
        assert httpx.get(f"{url}/models").json()["data"][0]["max_model_len"] == 8192
        server.terminate()


def test_what_has_a_counterpart_becomes_it() -> None:
    own, notes = own_arguments(
        ["serve", "--model-path", "/m", "--kv-offloading-size=16", "--kv-disk-space-mb", "500", "--disable-radix-cache"]
    )
    assert own == [
        "serve", "/m", "--kv-host-memory", "16GiB", "--kv-disk-space", "500MB", "--no-enable-prefix-caching",
    ]  # fmt: skip
    assert notes == []


def test_what_has_no_effect_is_said_and_own_flags_are_left_alone() -> None:
    given = ["serve", "default", "--port", "8000", "--enable-prefix-caching", "--kernels=plain"]
    assert own_arguments(given) == (given, [])
    own, notes = own_arguments([*given, "--block-size", "256", "--trust-remote-code", "--speculative-config", "{}"])
    assert own == given
    assert [note.split(" has no effect: ")[0] for note in notes] == [
        "--block-size 256", "--trust-remote-code", "--speculative-config {}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tensor-parallel-size", "8"), "--tensor-parallel-size: '8' is not 1: the model runs on one device"),
        (("--tool-call-parser=hermes",), "--tool-call-parser: 'hermes' is not auto or deepseek_v4"),
        (("--block-size",), "--block-size: a value is missing"),
        (("--gpu-memory-utilization", "1.5"), "memory_utilization: 1.5 is not above 0 and at most 1"),
        (("--hicache-ratio", "-1"), "kv_host_ratio: -1.0 is below 0"),
    ],
)
def test_what_is_not_there_is_an_error(flags: tuple[str, ...], said: str) -> None:
    assert said in run("serve", *flags, ok=False)


def test_notes_come_before_anything_is_loaded() -> None:
    command = [sys.executable, "-m", "thalweg", "serve", "/nowhere", "--page-size", "64"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    first, last = result.stderr.strip().splitlines()[0], result.stderr.strip().splitlines()[-1]
    assert first.startswith("thalweg: --page-size 64 has no effect:") and "/nowhere" in last


def test_a_share_of_the_memory_holds_weights_and_pools() -> None:
    share = 0.06
    runtime = build_runtime(load_options({"memory_utilization": share}, environment={}))
    share, total = share * psutil.virtual_memory().total, runtime.cache_plan.total_bytes
    weights = (default_model() / "model.safetensors").stat().st_size
    assert share - 3 * weights - 2**21 <= total <= share - 0.9 * weights
    with pytest.raises(ConfigError, match="the weights take"):
        build_runtime(load_options({"memory_utilization": 1e-5}, environment={}))


def test_the_host_tier_as_a_share_of_the_pools() -> None:
    options = load_options({"kv_cache_memory": "64MiB", "kv_host_ratio": 2}, environment={})
    runtime = build_runtime(options)
    host = runtime.engine.tiers()[0]
    assert host.name == "host" and 1.9 * 2**26 <= host.capacity_bytes <= 2 * 2**26
