"""What clients do wrong, what they do to the connection, and what operators look at."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import FLAGS, Server, start

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
LIMIT = 64 * 2**20


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", ""),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role", "Did you mean 'user'"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text"),
        ({"temperatur": 1}, "temperatur", "Did you mean 'temperature'"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"temperature": 2.5}, "temperature", "at most 2"),
        ({"top_p": 0}, "top_p", "0"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "above max_tokens 3"),
        ({"stop": 7}, "stop", "a string or a list"),
        ({"stop": [1]}, "stop[0]", "string"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"n": 0}, "n", "1"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge", "Did you mean 'include_usage'"),
        ({"stream_options": {"incl": True}}, "stream_options.incl", "Supported: include_usage"),
        ({"stream_options": [True]}, "stream_options", "must be an object"),
        ({"thinking": {"type": "on"}}, "thinking.type", "enabled"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "max"),
        ({"chat_template_kwargs": {"thinkin": True}}, "chat_template_kwargs.thinkin", "Did you mean 'thinking'"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking", "both"),
        ({"response_format": {"type": "json"}}, "response_format.type", "json_object"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "requird"}, "tool_choice", "Did you mean 'required'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ""),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "-100 to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "0 to 2047"),
        ({"stop_token_ids": [99999], "min_tokens": 1, "max_tokens": 2}, "stop_token_ids", "0 to 2047"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens", "enabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}, "thinking_budget": 6}, "thinking_budget", "differ"),
        ({"cache_salt": 7}, "cache_salt", "string"),
        ({"model": 7}, "model", "string"),
    ],
)
def test_bad_chat_fields_are_named(http: httpx.Client, fields: dict, param: str, words: str) -> None:
    body = fields if "messages" in fields or not fields else {"messages": HELLO, **fields}
    response = http.post(CHAT, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error
    assert error["type"] == "invalid_request_error" and "Input should" not in error["message"]
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "empty"),
        ({"prompt": [2**40]}, "vocabulary"),
        ({"prompt": [9999]}, "0 to 2047"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "x", "logprobs": 21}, "20"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": ["x"] * 65}, "64"),
        ({"prompt": "x", "max_tokens": 10**9}, "max_model_len"),
    ],
)
def test_bad_completion_fields_are_named(http: httpx.Client, fields: dict, words: str) -> None:
    response = http.post("/v1/completions", json=fields)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[1]", b'"x"', b'{"messages": NaN}', b"\xff\xfe", b"{" * 100_000])
def test_bodies_that_are_no_json_object(http: httpx.Client, body: bytes) -> None:
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", '{"prompt":[' + "1," * 2_000_000 + '"a"]}', "prompt[2000000] must be an integer"),
        (CHAT, '{"messages":[' + "1," * 2_000_000 + "1]}", "messages[0]"),
        ("/detokenize", '{"tokens":[' + '"a",' * 2_000_000 + "1]}", "tokens[0]"),
        (CHAT, '{"' + "a" * 8_000_000 + '":1}', "not a supported field"),
    ],
)
def test_long_nonsense_is_refused_at_its_first_fault(http: httpx.Client, path: str, body: str, words: str) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"}, timeout=15)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_fields_without_effect_are_accepted(http: httpx.Client) -> None:
    extra = {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "parallel_tool_calls": True}
    nulls = {"temperature": None, "stop": None, "tools": None, "response_format": {"type": "text"}}
    body = {"messages": HELLO, "max_tokens": 1, **extra, **nulls}
    assert http.post(CHAT, json=body).status_code == 200
    assert http.post("/chat/completions", json=body).status_code == 200


def test_routes_methods_and_types(http: httpx.Client) -> None:
    for response, status in (
        (http.get("/nothing"), 404),
        (http.get(CHAT), 405),
        (http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert http.get(CHAT).headers["allow"] == "POST"
    assert http.get("/version").json()["version"]
    assert http.head("/metrics").status_code == 200


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "def f(x):\n    return 'héllo <｜User｜>'"
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens[1:]}).json()["prompt"] == text
    chat = http.post("/tokenize", json={"messages": HELLO}).json()
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 1}).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]
    assert http.post("/detokenize", json={"tokens": [5000]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


def test_body_limit(http: httpx.Client, server: Server) -> None:
    big = b'{"messages": "' + b"x" * (LIMIT + 10) + b'"}'
    response = http.post(CHAT, content=big, headers={"content-type": "application/json"})
    assert response.status_code == 413 and str(LIMIT) in response.json()["error"]["message"]
    pieces = (b"x" * 2**20 for _ in range(66))
    response = http.post(CHAT, content=pieces, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert server.health()["status"] == "ok"


def test_over_length_is_refused_with_the_numbers(http: httpx.Client) -> None:
    limit = http.get("/v1/models").json()["data"][0]["max_model_len"]
    ids = [5] * (limit + 1)
    error = http.post("/v1/completions", json={"prompt": ids}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(limit) in error["message"] and str(limit + 1) in error["message"]


def long_text(words: int) -> str:
    return " ".join(f"word{i % 977} x{i}" for i in range(words))


def test_a_streaming_client_that_leaves_is_forgotten(http: httpx.Client, server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 5000, "stream": True, "ignore_eos": True}

    def cancelled() -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [s for f in families for s in f.samples if s.name == "thalweg_requests_finished_total"]
        return sum(s.value for s in samples if s.labels["reason"] == "cancelled")

    before = cancelled()
    with http.stream("POST", CHAT, json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                break
    server.wait_idle(5)
    assert cancelled() == before + 1


def test_clients_that_leave_during_a_prefill_are_forgotten(server: Server) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": long_text(60_000)}], "stream": True, "max_tokens": 5})
    whole = json.dumps({"messages": [{"role": "user", "content": "y" + long_text(60_000)}], "max_tokens": 5})
    with (
        httpx.Client(base_url=server.url) as client,
        client.stream("POST", CHAT, content=body, headers={"content-type": "application/json"}) as response,
    ):
        assert any("prefill " in line for line in response.iter_lines())
    server.wait_idle(5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + CHAT, content=whole, headers={"content-type": "application/json"}, timeout=4)
    server.wait_idle(5)


def test_health_answers_while_a_long_prompt_is_read_and_computed(server: Server) -> None:
    """A body of 4 MB is parsed, encoded and prefilled; /health takes below 100 ms all the while (median and 95%)."""
    text = " self return None import raise class" * 118_000
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1, "stream": True})
    assert len(body) > 4_000_000
    seen: list[float] = []
    progress = threading.Event()

    def send() -> None:
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            client.stream("POST", CHAT, content=body, headers={"content-type": "application/json"}) as response,
        ):
            for line in response.iter_lines():
                if "prefill " in line:
                    progress.set()
                    if len(seen) > 60:
                        return

    sender = threading.Thread(target=send)
    sender.start()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while sender.is_alive():
            begin = time.monotonic()
            assert client.get("/health").status_code == 200
            seen.append(time.monotonic() - begin)
            time.sleep(0.02)
    sender.join()
    assert progress.is_set()
    seen.sort()
    assert seen[len(seen) // 2] < 0.1
    assert seen[int(len(seen) * 0.95)] < 0.1, seen[-10:]
    server.wait_idle(5)


def test_metrics_add_up(http: httpx.Client) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {s.name: s.value for f in families for s in f.samples if s.labels.keys() <= {"model_name", "engine"}}

    before = read()
    usages = [
        http.post(CHAT, json={"messages": HELLO, "max_tokens": 5, "ignore_eos": True}).json()["usage"] for _ in range(3)
    ]
    after = read()

    def grown(name: str) -> float:
        return after[name] - before[name]

    for prefix in ("thalweg_", "vllm:"):
        assert grown(f"{prefix}prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
        assert grown(f"{prefix}generation_tokens_total") == 15
        assert grown(f"{prefix}prefix_cache_hits_total") == sum(u["prompt_cache_hit_tokens"] for u in usages)
        assert grown(f"{prefix}time_to_first_token_seconds_count") == 3
        assert grown(f"{prefix}inter_token_latency_seconds_count") == 12
        assert grown(f"{prefix}e2e_request_latency_seconds_count") == 3
    assert after["thalweg_num_requests_running"] == 0


def test_reset_prefix_cache(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": long_text(300)}], "max_tokens": 1}
    http.post(CHAT, json=body)
    assert http.post(CHAT, json=body).json()["usage"]["prompt_cache_hit_tokens"] > 0
    assert http.post("/reset_prefix_cache").json()["forgotten_tokens"] > 0
    assert http.post(CHAT, json=body).json()["usage"]["prompt_cache_hit_tokens"] == 0


@pytest.mark.parametrize(("sent", "flags"), [(signal.SIGTERM, ("--shutdown-timeout", "0")), (signal.SIGINT, ())])
def test_signals_end_the_server_within_seconds_even_while_it_computes(
    sent: signal.Signals, flags: tuple[str, ...]
) -> None:
    server = start(*flags)
    body = json.dumps({"messages": [{"role": "user", "content": long_text(60_000)}], "stream": True})
    with (
        httpx.Client(base_url=server.url) as client,
        client.stream("POST", CHAT, content=body, headers={"content-type": "application/json"}) as response,
    ):
        lines = response.iter_lines()
        assert any("prefill " in line for line in lines)
        begin = time.monotonic()
        server.process.send_signal(sent)
        server.process.wait(10)
        assert time.monotonic() - begin < 4
    assert "Traceback" not in server.process.stderr.read()


def test_sigterm_lets_answers_end_and_takes_nobody_in() -> None:
    server = start()
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=server.url, timeout=60) as client, client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        assert any('"content"' in line for line in lines)
        server.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=server.url, timeout=10) as other:
            while other.get("/health/ready").status_code != 503:
                time.sleep(0.01)
            refused = other.post(CHAT, json=body | {"stream": False})
            assert refused.status_code == 503 and refused.headers["retry-after"] and "stopping" in refused.text
            assert other.get("/health").status_code == 200
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] and any('"finish_reason":"length"' in line for line in rest)
    assert server.process.wait(10) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.process.stderr.read()


def test_a_taken_port_and_wrong_options_are_one_line() -> None:
    def fails(*flags: str) -> str:
        command = [sys.executable, "-m", "thalweg", "serve", *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        return result.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in fails("--port", port)
    assert "65535" in fails("--port", "70000")
    assert "max_model_len: 9999999" in fails("--port", "0", "--max-model-len", "9999999")
    assert "too few for max_num_seqs" in fails("--port", "0", "--kv-cache-memory", "1MB")
    assert "--max-model-len" in fails("--max-model-length", "5")
    assert "nowhere" in fails("--port", "0", "nowhere")


def test_flags_of_other_engines_are_understood() -> None:
    server = start("--context-length", "4096", "--served-model-name", "mine", "--no-enable-prefix-caching")
    try:
        card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        assert (card["id"], card["max_model_len"]) == ("mine", 4096)
        body = {"messages": [{"role": "user", "content": long_text(200)}], "max_tokens": 1, "model": "mine"}
        for _ in range(2):
            usage = httpx.post(server.url + CHAT, json=body, timeout=60).json()["usage"]
            assert usage["prompt_cache_hit_tokens"] == 0
    finally:
        server.process.terminate()
        server.process.wait(10)
    assert FLAGS


def test_generate_streams_to_standard_output() -> None:
    command = [sys.executable, "-m", "thalweg", "generate"]
    flags = ["--file", "-", "--max-tokens", "5", "--kv-cache-memory", "64MiB"]
    result = subprocess.run([*command, *flags], input="hello", capture_output=True, text=True, check=True, timeout=60)
    assert len(result.stdout) > 1 and result.stderr == ""
    missing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and "--prompt or --file" in missing.stderr
    nothing = [*command, "--prompt", "x", "--max-tokens", "0"]
    refused = subprocess.run(nothing, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stdout == "" and "max-tokens" in refused.stderr
