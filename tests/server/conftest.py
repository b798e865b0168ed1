"""A real server process on the embedded model, once for all tests here."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from openai import OpenAI

FLAGS = ("--threads", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--kv-cache-memory", "512MiB")


@dataclass
class Server:
    """Where the server listens, and its process."""

    process: subprocess.Popen[str]
    url: str

    def health(self) -> dict[str, int]:
        return httpx.get(f"{self.url}/health", timeout=10).json()

    def wait_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.health()
            if state["running"] == state["waiting"] == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"requests are left over: {self.health()}")


def start(*flags: str, port: str = "0", program: tuple[str, ...] = ("thalweg",)) -> Server:
    """A server with these flags; `program` is the module to run and what it takes before `serve`."""
    command = [sys.executable, "-m", *program, "serve", "--port", port, *FLAGS, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("ready on "):
            return Server(process, line.split()[-1].removesuffix("/v1"))
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    running = start()
    yield running
    running.process.terminate()
    assert running.process.wait(10) is not None


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
