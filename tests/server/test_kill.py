"""The whole server killed while it reads prompts and writes records, and started again on the same directory."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.cli.commands import run
from tests.memory.records import directory_bytes
from tests.server.conftest import Server, start
from thalweg.memory.folder import open_folder
from thalweg.memory.record import RecordKind, split_digests

UNIT = 128
REPLAY_UNITS = 4  # of the embedded model
CLIENTS = 3
# With it answers are the same bits in any batch and after any hit, so that log-probabilities can be compared, too.
FLAGS = ("--deterministic", "--kv-host-memory", "0", "--kv-cache-memory", "64MiB")
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Recorded:
    """What the catalogue calls durable, read as commands read it."""

    names: frozenset[str] = frozenset()
    root: bytes = b""
    rows: frozenset[bytes] = frozenset()  # digests of units
    checkpoints: frozenset[bytes] = frozenset()

    def promised_tokens(self, prompt: Prompt) -> int:
        """Tokens that need not be computed: up to the deepest checkpoint, or a replay before the last known unit."""
        digest, known, kept = self.root, 0, 0
        for unit in range((len(prompt) - 1) // UNIT):
            tokens = np.array(prompt[unit * UNIT : (unit + 1) * UNIT], "<i4")
            digest = blake2b(digest + tokens.tobytes(), digest_size=16).digest()
            if digest not in self.rows:
                break
            known = unit + 1
            kept = known if digest in self.checkpoints else kept
        return max(kept, known - REPLAY_UNITS) * UNIT


def recorded(directory: Path) -> Recorded:
    folder = open_folder(directory)
    entries = folder.catalogue.entries("durable")
    folder.catalogue.close()
    roots = {entry.namespace for entry in entries}
    assert len(roots) <= 1, "one server made several namespaces"
    tables = {
        kind: frozenset(digest for e in entries if e.kind == kind for digest in split_digests(e.digests))
        for kind in RecordKind
    }
    names = frozenset(entry.name for entry in entries)
    return Recorded(names, *(roots or {b""}), tables[RecordKind.ROWS], tables[RecordKind.CHECKPOINT])


@dataclass
class Figures:
    """What a run came to."""

    kills: int = 0
    answers: int = 0
    cut_off: int = 0  # requests that a kill ended
    promised_tokens: int = 0
    served_tokens: int = 0  # of those promised
    lost_records: int = 0
    durable_records: int = 0
    most_bytes: int = 0
    evicted: bool = False
    half_written: int = 0  # files that a kill left
    unrecorded: int = 0  # whole files that a kill left without a durable entry


@dataclass
class Trial:
    """One directory through many servers; `cold` never reuses anything."""

    directory: Path
    space: int
    cold: Future[Server]
    chance: random.Random
    prompts: int  # new ones for each server
    figures: Figures = field(default_factory=Figures)
    expected: dict[Prompt, Any] = field(default_factory=dict)

    def run(self, kills: int) -> None:
        before, prompts = Recorded(), []
        for number in range(kills + 1):
            server = start(*FLAGS, "--kv-disk-dir", str(self.directory), "--kv-disk-space", str(self.space))
            with ended(server):
                self.check_directory(before)
                self.check_answers(server, prompts, before)
                if number == kills:
                    server.process.terminate()
                    server.process.wait(20)
                    break
                prompts = [self.new_prompt() for _ in range(self.prompts)] + self.chance.sample(
                    prompts, min(2, len(prompts))
                )
                before = self.kill_while_busy(server, prompts)
        verify(self.directory)

    def new_prompt(self) -> Prompt:
        length = self.chance.choice((140, 300, 600, 900))
        return tuple(self.chance.choices(range(300, 2000), k=self.chance.randint(length // 2, length)))

    def kill_while_busy(self, server: Server, prompts: list[Prompt]) -> Recorded:
        """Kill it at a random moment after some answers; what was recorded just before."""
        answered, wanted = threading.Semaphore(0), self.chance.randint(0, 4)
        with ThreadPoolExecutor(CLIENTS) as clients:
            sent = [clients.submit(self.ask, server, prompt, answered) for prompt in prompts]
            for _ in range(wanted):
                assert answered.acquire(timeout=120)
            before = self.wait_for_the_moment()
            server.process.kill()
            server.process.wait()
            given = [outcome(future) for future in sent]
        self.figures.kills += 1
        self.measure()
        for prompt, answer in zip(prompts, given, strict=True):
            self.compare(prompt, answer)
        there = {path.name for path in self.directory.iterdir()}
        self.figures.half_written += sum(name.endswith(".tmp") for name in there)
        self.figures.unrecorded += sum(name.endswith(".kv") for name in there) - len(before.names & there)
        self.figures.evicted |= not before.names <= there
        self.figures.durable_records += len(before.names)
        return Recorded(before.names & there, before.root, before.rows, before.checkpoints)

    def wait_for_the_moment(self) -> Recorded:
        """Any moment; every second time in the middle of a write, if one begins soon. What was recorded before it."""
        moment = time.monotonic() + self.chance.uniform(0, 0.4)
        while time.monotonic() < moment:
            self.measure()
            time.sleep(0.01)
        before = recorded(self.directory)
        if self.chance.random() < 0.5:
            moment, delay = time.monotonic() + 5, self.chance.uniform(0, 0.004)
            while time.monotonic() < moment and not any(self.directory.glob("*.tmp")):
                pass
            time.sleep(delay)
        return before

    def ask(self, server: Server, prompt: Prompt, answered: threading.Semaphore) -> dict[str, Any]:
        try:
            return asked(server, prompt)
        finally:
            answered.release()

    def check_directory(self, before: Recorded) -> None:
        """Right after a start: what was durable and not evicted is there, sound, and nothing else is left."""
        self.measure()
        now = recorded(self.directory)
        self.figures.lost_records += len(before.names - now.names)
        assert {path.name for path in self.directory.glob("*.kv")} == now.names
        assert not list(self.directory.glob("*.tmp"))
        verify(self.directory)

    def check_answers(self, server: Server, prompts: list[Prompt], before: Recorded) -> None:
        """The same answers as a cold server's, and what was promised comes from the disk."""
        for prompt in prompts:
            answer = asked(server, prompt)
            self.compare(prompt, answer)
            promised = before.promised_tokens(prompt)
            self.figures.promised_tokens += promised
            self.figures.served_tokens += min(promised, answer["cache"]["resume_token"])
            self.measure()

    def compare(self, prompt: Prompt, answer: dict[str, Any] | None) -> None:
        if answer is None:
            self.figures.cut_off += 1
            return
        self.figures.answers += 1
        if prompt not in self.expected:
            self.expected[prompt] = asked(self.cold.result(), prompt)["choices"]
        assert answer["choices"] == self.expected[prompt]

    def measure(self) -> None:
        size = directory_bytes(self.directory)
        assert size <= self.space
        self.figures.most_bytes = max(self.figures.most_bytes, size)


def asked(server: Server, prompt: Prompt) -> dict[str, Any]:
    body = {
        "model": "thalweg-tiny", "prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True,
        "logprobs": 2, "return_cache_report": True,
    }  # fmt: skip
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def outcome(future: Future[dict[str, Any]]) -> dict[str, Any] | None:
    """The answer, or None for a request that the server's death cut off."""
    try:
        return future.result()
    except httpx.TransportError:
        return None


def verify(directory: Path) -> None:
    said = run("cache", "verify", str(directory))
    assert " 0 damaged" in said and "unreachable" not in said, said


@contextlib.contextmanager
def ended(server: Server) -> Iterator[None]:
    """A server that is over when the block is, and had no complaint about its disk cache."""
    assert server.process.stdout is not None and server.process.stderr is not None
    try:
        yield
    finally:
        server.process.kill()
        server.process.wait()
        said = server.process.stderr.read()
        server.process.stdout.close()
        server.process.stderr.close()
    assert "cache" not in said and "Traceback" not in said, said


def killed(directory: Path, kills: int, space: int, prompts: int) -> Figures:
    with ThreadPoolExecutor(1) as starter:
        cold = starter.submit(start, *FLAGS, "--no-enable-prefix-caching")
        trial = Trial(directory, space, cold, random.Random(kills), prompts)
        try:
            trial.run(kills)
        finally:
            with ended(cold.result()):
                print(trial.figures)
    return trial.figures


def test_a_killed_server_comes_back_with_what_it_had_stored(tmp_path: Path) -> None:
    figures = killed(tmp_path / "cache", 3, 256 << 20, 4)
    assert figures.lost_records == 0 and not figures.evicted
    assert figures.served_tokens >= 0.99 * figures.promised_tokens > 0, figures


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kills", "space"), [(30, 256 << 20), (20, 5 << 20)], ids=["roomy", "evicting"])
def test_fifty_kills(tmp_path: Path, kills: int, space: int) -> None:
    figures = killed(tmp_path / "cache", kills, space, 7)
    assert figures.lost_records == 0 and figures.evicted == (space == 5 << 20)
    if not figures.evicted:
        assert figures.served_tokens >= 0.99 * figures.promised_tokens > 0, figures
