"""How long a prompt will take: told in a header, and refused where that is too long."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.server.conftest import Server, start

HEADER = "X-Thalweg-Expected-TTFT-Seconds"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = start("--max-queue-seconds", "10", "--max-model-len", "600000")
    yield server
    server.process.terminate()
    server.process.wait(20)


def ask(server: Server, tokens: int, seed: int, *, stream: bool = False) -> Any:
    prompt = np.random.default_rng(seed).integers(100, 1900, tokens).tolist()
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "stream": stream}).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", body, headers), timeout=120)


def test_a_prompt_is_told_when_its_first_token_comes_or_refused(server: Server) -> None:
    """The first prompt of all has no estimate; then estimates are there, and one beyond the limit is a 429 with it."""
    with ask(server, 3000, 1) as response:
        assert HEADER not in response.headers
    for stream in (False, True):
        begin = time.monotonic()
        with ask(server, 3000, 2 + stream, stream=stream) as response:
            expected = float(response.headers[HEADER])
            response.read()
        assert 0 < expected < 20 * (time.monotonic() - begin)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, 500_000, 4)
    error = json.loads(refused.value.read())["error"]
    assert refused.value.code == 429 and error["type"] == "overloaded" and "max_queue_seconds is 10" in error["message"]
    assert int(refused.value.headers["Retry-After"]) >= 1
    with ask(server, 3000, 5) as response:
        assert response.status == 200, "a refused request leaves nothing behind"


def test_what_is_cached_is_not_waited_for(server: Server) -> None:
    with ask(server, 20_000, 6) as response:
        cold = float(response.headers[HEADER])
    with ask(server, 20_000, 6) as response:
        assert float(response.headers[HEADER]) < cold / 4
