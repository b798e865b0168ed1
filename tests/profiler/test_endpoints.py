"""Endpoints that say little, or answer strangely: the profile says what is missing, errors are one clear line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import run
from thalweg.profiler.counters import hit_tokens, running_requests, stated_capacity
from thalweg.profiler.profile import Profile

TINY = ("--contexts", "64,128", "--samples", "1", "--stages", "surfaces,cache,checks", "--fill-lengths", "64")


def alike(one: str, two: str) -> int:
    """How many characters they begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


class Silent(BaseHTTPRequestHandler):
    """Only chat, no usage, no metrics, no forced length: a token a word. Repeated prompts are answered sooner, and
    unknown fields are refused, as by the strictest."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: set[str]

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, json.dumps({"data": [{"id": "quiet"}]}).encode())
        else:
            self._send(404, b"{}")

    def do_POST(self) -> None:
        fields: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = {"model", "messages", "max_tokens", "temperature", "stream"}
        if self.path != "/v1/chat/completions" or set(fields) - known:
            self._send(400, b'{"error": {"message": "unknown field"}}')
            return
        text = fields["messages"][0]["content"]
        self._heard(text)
        words = ["one", " two", " three"][: fields["max_tokens"]]
        chunks = [
            {"choices": [{"delta": {"role": "assistant"}}]},
            *({"choices": [{"delta": {"content": w}}]} for w in words),
        ]
        stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self._send(200, stream.encode())

    def _heard(self, text: str) -> None:
        time.sleep(0.002 if text in self.seen else 0.002 + len(text) * 1e-4)
        self.seen.add(text)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Counting(Silent):
    """Repeated prompts and beginnings are served in steps of 16 characters, and only a counter says so."""

    hits: int

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, f"vllm:prefix_cache_hits_total {float(self.hits)}\n".encode())
        else:
            super().do_GET()

    def _heard(self, text: str) -> None:
        shared = max((alike(text, old) for old in self.seen), default=0)
        type(self).hits += shared - shared % 16
        self.seen.add(text)


@pytest.fixture
def quiet() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (Silent,), {"seen": set()}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_endpoint_that_says_nothing_is_measured_by_time(quiet: str, tmp_path: Path) -> None:
    shown = run("profile", quiet, "--out", str(tmp_path), "--quick", "--budget", "60s", "--fill", "2k", *TINY)
    found = Profile.load(tmp_path / "profile.json")
    assert (found.endpoint.api, found.endpoint.usage_reported, found.endpoint.cached_tokens_reported) == (
        "chat",
        False,
        False,
    )
    assert not found.endpoint.output_length_forced
    assert found.endpoint.max_model_len is None
    for words in ("cached tokens: not reported", "usage: not reported", "output length: cannot be forced", "not told"):
        assert words in shown
    assert {cell.row for cell in found.ttft_cells} == {0.0, 0.5, 0.9, 1.0}
    assert found.ttft(128, 0.0).value > 1.5 * found.ttft(128, 1.0).value
    assert found.cache.unit_tokens is None
    assert found.cache.enabled, "repetitions are sooner"
    assert all(check.passed for check in found.checks if check.what == "continuation")
    assert not any(check.found for check in found.checks if check.what == "needle")


def test_hits_are_counted_where_answers_do_not_report_them(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Counting", (Counting,), {"seen": set(), "hits": 0}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        shown = run("profile", url, "--out", str(tmp_path), "--quick", "--contexts", "512", "--samples", "1",
                    "--stages", "cache", "--fill", "0", "--fill-lengths", "64")  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert "not reported; hits are told by the counter of /metrics" in shown
    assert Profile.load(tmp_path / "profile.json").cache.unit_tokens == 16


def test_failures_are_one_line_and_what_was_measured_stays(quiet: str, tmp_path: Path) -> None:
    message = run("profile", quiet, "--model", "quiet", "--out", str(tmp_path / "a" / "b"), "--seed", "1", "--quick",
                  "--contexts", "64", "--samples", "1", "--stages", "surfaces", ok=True)  # fmt: skip
    assert "profile.json" in message
    refused = run("profile", quiet, "--out", str(tmp_path / "a" / "b"), "--seed", "2", "--quick",
                  "--contexts", "64", ok=False)  # fmt: skip
    assert refused.count("\n") == 1 and "--fresh discards them" in refused
    for wrong in ("ftp://host", "http://", "http://host:99999"):
        assert "no address" in run("profile", wrong, ok=False) or "port" in run("profile", wrong, ok=False).lower()


def test_metrics_as_servers_name_them() -> None:
    vllm = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="100"} 1.0\n'
    assert stated_capacity(f"# HELP x\n{vllm}") == 1600
    assert stated_capacity('sglang:max_total_num_tokens{model_name="m"} 1.5e+06\n') == 1_500_000
    assert stated_capacity('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n') is None
    assert stated_capacity("python_info 1.0\n") is None
    two = 'vllm:prefix_cache_hits_total{engine="0"} 10.0\nvllm:prefix_cache_hits_total{engine="1"} 5.0\n'
    assert hit_tokens(two + "vllm:prefix_cache_hits_created 1.7e9\n") == 15
    assert running_requests("llamacpp:requests_processing 2\n") == 2
    assert hit_tokens("") is running_requests("") is None
