"""Everything at once, for a while: `python -m benchmarks.soak OUT.jsonl [--seconds N] [--clients N] [--seed N]`.

Clients send random requests of every API (benchmarks.traffic) to one real server over kept connections. Some of them
leave: within their own request, before its answer, in its prefill, in mid-stream. Afterwards everything must be
answered, greedy answers must not have changed, the server must hold no block, and have no more memory, files and
threads than after it was warm. One JSON line per run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import psutil

from benchmarks.commit import commit_name
from benchmarks.traffic import DOCUMENT_CHARACTERS, DOCUMENTS, Call, Traffic
from thalweg.cli.demo import machine_facts, running_server
from thalweg.evaluation.endpoint import Client
from thalweg.prose.library import library_texts

FLAGS = (
    "--threads", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--max-model-len", "65536",
    "--kv-cache-memory", "128MiB", "--kv-host-memory", "32MiB", "--kv-disk-space", "64MiB", "--disable-log-requests",
)  # fmt: skip
PATIENCE_SECONDS = 900.0  # without a byte: then a request counts as unanswered
LEAVING_SHARE, LATEST_LEAVE_SECONDS = 0.25, 3.0
WARM_SHARE = 0.4  # of the run: by then pools, tiers and histories are full


class LeftError(Exception):
    """The client went before the end of the answer, as it had planned."""


@dataclass
class Tally:
    """What became of the requests of all clients. `faults` says what was wrong; none is expected."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    probes: dict[int, set[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, call: Call, outcome: str, fault: str | None = None) -> None:
        with self.lock:
            self.outcomes[f"{call.api} {outcome}"] += 1
            if fault is not None:
                self.faults.append(f"{call.api} {call.body[:300]!r}: {fault:.500}")

    def answered(self, call: Call, text: str) -> None:
        """A whole answer with the right status."""
        fault = _fault(call, text)
        self.count(call, "refused" if call.status >= 400 else "answered", fault)
        if call.probe is not None and fault is None:
            with self.lock:
                self.probes.setdefault(call.probe, set()).add(json.loads(text)["choices"][0]["text"])


def _fault(call: Call, text: str) -> str | None:
    """What is wrong with a whole answer."""
    if call.streams:
        events = [line for line in text.splitlines() if line.startswith("data: ")]
        whole = bool(events) and any(end in events[-1] for end in call.ends)
        return None if whole and '"error":{' not in text else f"a stream that ends with {events[-1:]}"
    fields = json.loads(text)
    if call.status >= 400:
        return None if "error" in fields else f"a refusal without a reason: {text}"
    choices = len(fields["choices"]) if "choices" in fields else 1
    return None if choices == call.choices else f"{choices} choices"


class Visitor:
    """One client: sends one request after the other until it is told to stop."""

    def __init__(self, url: str, traffic: Traffic, tally: Tally, stop: threading.Event) -> None:
        self._address = urlsplit(url)
        self._traffic = traffic
        self._tally = tally
        self._stop = stop
        self._connection = self._connected()
        self.thread = threading.Thread(target=self._run)

    def _connected(self) -> http.client.HTTPConnection:
        assert self._address.hostname is not None, "a server that runs has an address"
        return http.client.HTTPConnection(self._address.hostname, self._address.port, timeout=PATIENCE_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._visit(self._traffic.call())
        self._connection.close()

    def _visit(self, call: Call) -> None:
        """One request, to its end or to where the client leaves."""
        leaves = self._traffic.happens(LEAVING_SHARE)
        until = time.monotonic() + self._traffic.delay(LATEST_LEAVE_SECONDS) if leaves else None
        try:
            if leaves and self._traffic.happens(0.1):
                self._send_half(call)
            status, text = self._exchange(call, until)
        except LeftError:
            self._tally.count(call, "left")
            self._connection.close()
        except (OSError, http.client.HTTPException) as error:
            self._tally.count(call, "failed", repr(error))
            self._connection.close()
        else:
            if status == call.status:
                self._tally.answered(call, text)
            else:
                self._tally.count(call, "failed", f"{status} {text}")

    def _send_half(self, call: Call) -> None:
        self._connection.putrequest("POST", call.path)
        self._connection.putheader("Content-Type", call.content_type)
        self._connection.putheader("Content-Length", str(len(call.body)))
        self._connection.endheaders(call.body[: len(call.body) // 2])
        raise LeftError

    def _exchange(self, call: Call, until: float | None) -> tuple[int, str]:
        """The status and the whole body. Raises LeftError at `until`."""
        self._connection.request("POST", call.path, call.body, {"Content-Type": call.content_type})
        socket = self._connection.sock
        try:
            socket.settimeout(_left(until))
            response = self._connection.getresponse()
            body = bytearray()
            while part := response.read1(65536):
                body += part
                socket.settimeout(_left(until))
        except TimeoutError:
            if until is None:
                raise
            raise LeftError from None
        if not response.isclosed():  # http.client keeps the connection only after a read that finds the end
            response.read()
        socket.settimeout(PATIENCE_SECONDS)
        return response.status, body.decode()


def _left(until: float | None) -> float:
    """How long to wait for the next byte."""
    return PATIENCE_SECONDS if until is None else max(0.001, until - time.monotonic())


@dataclass
class Watch:
    """Samples of the server's process, once a second."""

    process: psutil.Process
    seconds: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def sample(self, now: float) -> None:
        self.seconds.append(now)
        self.resident_bytes.append(self.process.memory_info().rss)
        self.files.append(self.process.num_fds())
        self.threads.append(self.process.num_threads())

    def facts(self) -> dict[str, Any]:
        """Figures of the whole run; the slope is that of a line through the samples since the server was warm."""
        warm = int(WARM_SHARE * len(self.seconds))
        minutes, mebibytes = np.array(self.seconds[warm:]) / 60, np.array(self.resident_bytes[warm:]) / 2**20
        third = max(1, len(self.seconds) // 10)
        return {
            "resident_mib_per_minute": float(np.polyfit(minutes, mebibytes, 1)[0]),
            "resident_mib": {"first": self.resident_bytes[0] / 2**20, "warm": mebibytes[0], "last": mebibytes[-1]},
            "files": {"warm": median(self.files[warm : warm + third]), "last": median(self.files[-third:])},
            "threads": {"warm": max(self.threads[: warm + 1]), "last": max(self.threads[-third:])},
            "resident_mib_samples": [round(size / 2**20, 1) for size in self.resident_bytes[:: max(1, third // 12)]],
        }


def figures(client: Client) -> dict[str, float]:
    """The lines of /metrics by name and labels."""
    lines = (line.rsplit(" ", 1) for line in client.get("/metrics").splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def held_blocks(found: dict[str, float], kind: str) -> int:
    """Blocks of all groups: `used` are held by requests, `cached` by the prefix index."""
    return int(sum(value for name, value in found.items() if name.startswith(f"thalweg_cache_{kind}_blocks{{")))


def settled(client: Client, seconds: float = 60) -> dict[str, float]:
    """Metrics once nothing runs, waits or loads any more and no copy to a lower tier holds blocks; or after so many
    seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found = figures(client)
        requests = sum(found[f"thalweg_num_requests_{state}"] for state in ("running", "waiting", "loading"))
        if requests == held_blocks(found, "used") == 0 or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@contextmanager
def soaked_server() -> Iterator[tuple[Client, int, list[str]]]:
    """A server with all tiers, its process id, and what it writes to stderr."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server("default", *FLAGS, "--kv-disk-dir", folder) as (client, process),
    ):
        lines: list[str] = []
        assert process.stderr is not None, "the server was started with pipes"
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()
        yield client, process.pid, lines


def soak(seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """One run on a server of its own."""
    documents = _documents()
    tally, stop = Tally(), threading.Event()
    with soaked_server() as (client, process, log):
        watch = Watch(psutil.Process(process))
        settled(client)  # one that answers has opened what its event loop needs: that comes after it says it is ready
        idle_files = watch.process.num_fds()
        visitors = [
            Visitor(client.url, Traffic(documents, 1000 * seed + number), tally, stop) for number in range(clients)
        ]
        for visitor in visitors:
            visitor.thread.start()
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < seconds:
            watch.sample(now)
            time.sleep(1)
        stop.set()
        for visitor in visitors:
            visitor.thread.join()
        found = settled(client)
        urlopen(Request(f"{client.url}/reset_prefix_cache", method="POST")).close()
        after = settled(client)
        leaked_files = watch.process.num_fds() - idle_files
        still_open = len(json.loads(client.get("/live"))["open"])
    return {
        "seconds": seconds,
        "clients": clients,
        "seed": seed,
        "requests": sum(tally.outcomes.values()),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "faults": tally.faults[:20],
        "changed_answers": sum(len(texts) > 1 for texts in tally.probes.values()),
        "unended_requests": still_open + int(found["thalweg_num_requests_running"]),
        "leaked_blocks": held_blocks(found, "used"),
        "blocks_after_reset": held_blocks(after, "used") + held_blocks(after, "cached"),
        "leaked_files": leaked_files,
        "engine_ends": _ends(found),
        "logged_lines": log[:20],
        **watch.facts(),
    }


def _documents() -> list[str]:
    """Texts that do not begin alike."""
    text = ""
    for part in library_texts():
        text += part
        if len(text) > DOCUMENTS * DOCUMENT_CHARACTERS:
            break
    return [text[n * DOCUMENT_CHARACTERS : (n + 1) * DOCUMENT_CHARACTERS] for n in range(DOCUMENTS)]


def _ends(found: dict[str, float]) -> dict[str, int]:
    """How the engine's requests ended: a call with several choices is several of them."""
    start = 'thalweg_requests_finished_total{reason="'
    return {name[len(start) : -2]: int(value) for name, value in found.items() if name.startswith(start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    facts = {"commit": commit_name(), **soak(options.seconds, options.clients, options.seed), **machine_facts()}
    with options.out.open("a") as file:
        file.write(json.dumps(facts) + "\n")
    print(json.dumps({k: v for k, v in facts.items() if k != "resident_mib_samples"}, indent=1))


if __name__ == "__main__":
    main()
