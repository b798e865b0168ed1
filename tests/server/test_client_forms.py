"""What benchmark clients send and look for, beside what aiperf and guidellm do in benchmarks/clients.py."""

from __future__ import annotations

import asyncio
import json
import time
from statistics import median

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from tests.server.conftest import Server
from thalweg.errors import CancelledError
from thalweg.server.app import body_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Say more."}]}]
TEXT = [{"role": "user", "content": "Say more."}]
USAGE = {"include_usage": True}
# The bodies of each client, as its source writes them; all ask for exactly six tokens.
BODIES = {
    "vllm bench, chat": (CHAT, {
        "messages": PARTS, "max_completion_tokens": 6, "stream_options": USAGE, "ignore_eos": True, "temperature": 0.0,
        "repetition_penalty": 1.0,
    }),
    "vllm bench, completions": (COMPLETIONS, {
        "prompt": "Say more.", "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None, "stream_options": USAGE,
        "ignore_eos": True, "temperature": 0.0, "min_tokens": 6,
    }),
    "sglang bench, completions": (COMPLETIONS, {
        "prompt": [5, 300, 301], "temperature": 0.0, "best_of": 1, "max_tokens": 6, "ignore_eos": True,
        "stream_options": USAGE,
    }),
    "sglang bench, chat": (CHAT, {
        "messages": TEXT, "temperature": 0.0, "max_completion_tokens": 6, "ignore_eos": True, "stream_options": USAGE,
    }),
    "guidellm": (CHAT, {
        "messages": PARTS, "max_completion_tokens": 6, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }),
    "aiperf": (CHAT, {
        "messages": TEXT, "max_completion_tokens": 6, "ignore_eos": True, "min_tokens": 6, "seed": 3,
        "stream_options": USAGE,
    }),
}  # fmt: skip


@pytest.mark.parametrize("client", BODIES)
def test_bodies_of_benchmark_clients(http: httpx.Client, client: str) -> None:
    """Six tokens, the first of them in the first chunk with choices; usage in a last chunk without choices."""
    path, body = BODIES[client]
    with http.stream("POST", path, json={"model": "thalweg-tiny", "stream": True, **body}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    first, *_, last = (json.loads(event) for event in events[:-1])
    shown = first["choices"][0]
    assert shown["text"] if path == COMPLETIONS else shown["delta"]["content"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_kept_connection_answers_at_once(http: httpx.Client) -> None:
    """Not 40 ms later, when the other side acknowledges the headers (Nagle's algorithm)."""
    seconds = []
    for _ in range(15):
        begin = time.perf_counter()
        assert http.post("/tokenize", json={"prompt": "hello"}).status_code == 200
        seconds.append(time.perf_counter() - begin)
    assert median(seconds) < 0.02


def test_a_profile_counts_what_the_engine_did_meanwhile(http: httpx.Client, server: Server) -> None:
    assert http.post("/stop_profile").status_code == 400
    assert http.post("/start_profile").json() == {"status": "profiling"}
    usage = http.post(COMPLETIONS, json={"prompt": [9] * 50, "max_tokens": 8, "ignore_eos": True}).json()["usage"]
    server.wait_idle()
    profile = http.post("/stop_profile").json()
    assert profile["counters"]["step_tokens"] == usage["prompt_cache_miss_tokens"] + 7
    assert profile["counters"]["finished_length"] == 1 and profile["seconds"] > 0
    assert http.post("/stop_profile").json()["error"]["message"] == "no profile was started"


def test_what_dashboards_ask_for(http: httpx.Client) -> None:
    http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2})
    families = {family.name: family.type for family in text_string_to_metric_families(http.get("/metrics").text)}
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    counters = ("prefix_cache_queries", "prefix_cache_hits", "generation_tokens", "prompt_tokens", "num_preemptions")
    histograms = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
    for kind, names in (("gauge", gauges), ("counter", counters), ("histogram", histograms)):
        assert {families[f"vllm:{name}"] for name in names} == {kind}


def test_a_client_that_leaves_within_its_request_is_no_error_of_the_server() -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"10")]}
    with pytest.raises(CancelledError, match="disconnected"):
        asyncio.run(body_of(Request(scope, receive)))
