"""The server is what /openapi.json says: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.conftest import Server, start
from thalweg.server.openapi import OPERATIONS

ROOT = Path(__file__).parents[2]
SAME_EVERY_TIME = "--generation-deterministic"
KEY = "a-key-of-these-tests"
# Other spellings of paths that are tested, served by the same functions.
ALIASES = r"^/(chat|completions|beta|anthropic|models|responses|flush_cache)"
# That a body has the right form does not mean that its parts agree: positive_data_acceptance is no promise here.
LEFT_OUT = "positive_data_acceptance"


def schemathesis(server: Server, *flags: str, examples: int) -> str:
    """What it printed."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--no-color",
        "--phases", "coverage,fuzzing", "--exclude-checks", LEFT_OUT, "--exclude-path-regex", ALIASES,
        "--request-timeout", "120", "--max-examples", str(examples), "--warnings", "off", "--continue-on-failure",
        *flags,
    ]  # fmt: skip
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.server.cheap_requests", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    return result.stdout


def cases(printed: str) -> int:
    found = re.search(r"(\d+) generated, \1 passed", printed)
    assert found is not None, printed[-2000:]
    return int(found[1])


def test_the_server_keeps_to_its_document(server: Server) -> None:
    """A connection that idles all the while is still open afterwards: clients keep theirs for longer than 5 s."""
    idle = http.client.HTTPConnection(str(urlsplit(server.url).netloc), timeout=60)
    idle.request("GET", "/version")
    idle.getresponse().read()
    socket = idle.sock
    assert cases(schemathesis(server, SAME_EVERY_TIME, examples=8)) > 3000
    server.wait_idle()
    idle.request("GET", "/version")
    assert idle.getresponse().status == 200 and idle.sock is socket


@pytest.mark.stress
def test_the_server_keeps_to_its_document_for_long(server: Server) -> None:
    assert cases(schemathesis(server, "--seed", "1", "--generation-database", "none", examples=1000)) > 10_000


def test_every_endpoint_is_described(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1") and "securitySchemes" not in document["components"]
    described = {operation["summary"] for path in document["paths"].values() for operation in path.values()}
    assert described == {operation.summary for operation in OPERATIONS.values()}
    assert http.get("/docs").status_code == 404


def test_with_keys_everything_but_what_monitors_ask_wants_one() -> None:
    guarded = start("--api-key", KEY)
    try:
        paths = ("/tokenize", "/v1/models", "/version")
        only = [word for path in paths for word in ("--include-path", path)]
        key = ("-H", f"Authorization: Bearer {KEY}")
        document = httpx.get(f"{guarded.url}/openapi.json", headers={"x-api-key": KEY}).json()
        printed = schemathesis(
            guarded, SAME_EVERY_TIME, *only, *key, "--checks", "ignored_auth,status_code_conformance", examples=3
        )
    finally:
        guarded.process.terminate()
        guarded.process.wait(10)
    assert cases(printed) > 100
    guarded_paths = {path for path, methods in document["paths"].items() for m in methods.values() if "security" in m}
    assert set(document["paths"]) - guarded_paths == {"/health", "/health/ready", "/version", "/metrics"}
