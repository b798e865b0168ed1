"""The engine of a real server crashes: everybody is told to come again, and finds what the disk keeps."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Server, start
from thalweg.engine.engine import MOST_CRASHES

HELLO = [{"role": "user", "content": "some words " * 200}]
LONG = [{"role": "user", "content": "some words " * 20_000}]  # seconds of reading, before there is any event
ENDLESS = {"max_tokens": 50_000, "ignore_eos": True}
STREAMS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], str | None]]] = {
    "/v1/chat/completions": ({"messages": HELLO, **ENDLESS}, lambda event: event.get("error", {}).get("code")),
    "/v1/completions": ({"prompt": "some words", **ENDLESS}, lambda event: event.get("error", {}).get("code")),
    "/v1/messages": ({"messages": LONG, "max_tokens": 8}, lambda event: event.get("error", {}).get("type")),
}
CODES = {"/v1/messages": "overloaded_error"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    program = ("tests.server.crashing", str(tmp_path))
    running = start("--kv-disk-dir", str(tmp_path / "disk"), program=program)
    yield running
    running.process.terminate()
    running.process.wait(20)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line[6:]) for line in lines if line.startswith("data: {"))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def unavailable(response: httpx.Response, words: str) -> None:
    assert response.status_code == 503 and words in response.text, response.text
    assert response.headers["retry-after"] == "1"


def test_a_crash_is_a_503_and_then_all_is_as_before(server: Server, tmp_path: Path) -> None:
    client = httpx.Client(base_url=server.url, timeout=20)
    question = {"messages": HELLO, "max_tokens": 8, "temperature": 0, "return_cache_report": True}

    def ask() -> httpx.Response:
        return client.post("/v1/chat/completions", json=question)

    first = ask().json()
    with ExitStack() as stack:
        open_streams = {}
        for path, (body, _) in STREAMS.items():
            response = stack.enter_context(client.stream("POST", path, json={**body, "stream": True}))
            assert response.status_code == 200
            open_streams[path] = events(response.iter_lines())
        whole: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: whole.append(client.post("/v1/completions", json=STREAMS["/v1/completions"][0]))
        )
        thread.start()
        until(lambda: server.health()["running"] == len(STREAMS) + 1)
        (tmp_path / "hold").touch()
        (tmp_path / "crash").touch()
        for path, stream in open_streams.items():
            *_, last = stream
            assert STREAMS[path][1](last) == CODES.get(path, "unavailable"), last
            assert "send the request again" in last["error"]["message"]
    thread.join(30)
    for response in (whole[0], client.get("/health/ready"), client.get("/health"), ask()):
        unavailable(response, "the engine crashed and restarts")
    (tmp_path / "hold").unlink()
    until(lambda: client.get("/health/ready").status_code == 200)
    again = ask().json()
    assert again["choices"] == first["choices"]
    assert again["cache"]["disk_tokens"] > 300 and again["cache"]["device_tokens"] == again["cache"]["host_tokens"] == 0
    assert "thalweg_engine_restarts_total 1.0" in client.get("/metrics").text
    for _ in range(MOST_CRASHES - 1):
        until(lambda: client.get("/health/ready").status_code == 200)
        (tmp_path / "crash").touch()
        unavailable(ask(), "the engine ")
    until(lambda: "stopped working" in client.get("/health").text)
    for response in (client.get("/health/ready"), client.get("/health"), ask(), client.post("/reset_prefix_cache")):
        unavailable(response, "the engine stopped working: RuntimeError('lost count of blocks')")
    server.process.terminate()
    log = server.process.communicate(timeout=30)[1]
    assert log.count("the engine crashed and restarts: RuntimeError('lost count of blocks')") == MOST_CRASHES - 1
    assert log.count("the engine crashed and stays down") == 1
