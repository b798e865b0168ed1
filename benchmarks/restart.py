"""A long prompt after a restart, from disk: `python benchmarks/restart.py OUT.jsonl [--tokens N] [--runs N]`.

Each run: a server with a fresh disk directory reads a document cold; it is stopped; another one is started on the same
directory and asked again. The rate at which rows came back is compared with plain reads of the same files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from thalweg.cli.demo import machine_facts, read_document, running_server
from thalweg.evaluation.endpoint import Client
from thalweg.evaluation.exam import Answer, Asking, ask, model_name

QUESTION = "What is the value of buffer size?"
FLAGS = ("--kv-host-memory", "0", "--kv-disk-space", "4GiB")


def metric(client: Client, name: str) -> float:
    """A counter or gauge of /metrics, by its name and labels."""
    lines = (line.rsplit(" ", 1) for line in client.get("/metrics").splitlines() if not line.startswith("#"))
    return next((float(value) for key, value in lines if key == name), 0.0)


def answered(client: Client, document: str) -> Answer:
    return ask(client, Asking(model_name(client), 16), f"{document}\n\n{QUESTION}")


def settled(client: Client) -> None:
    """Wait until nothing more is written to the disk."""
    written = -1.0
    while written != (now := metric(client, 'thalweg_cache_tier_write_bytes_total{tier="disk"}')):
        written = now
        time.sleep(1)


_PLAIN_READ = """
import sys, time
from pathlib import Path
paths = sorted(Path(sys.argv[1]).rglob("*.kv"))
begin = time.perf_counter()
kept = [path.read_bytes() for path in paths]
print(sum(map(len, kept)) / (time.perf_counter() - begin))
"""


def plain_read_rate(directory: Path) -> float:
    """Bytes per second of reading the record files whole, one after another, in a process that has just begun, as the
    restarted server has: both pay for every page that they fill. The median of five processes."""
    command = [sys.executable, "-c", _PLAIN_READ, str(directory)]
    rates = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    return median(rates)


def run(document: str, flags: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        disk = (*flags, *FLAGS, "--kv-disk-dir", folder)
        with running_server("default", *disk) as (client, _):
            cold = answered(client, document)
            settled(client)
            table = (
                sum(metric(client, f'thalweg_cache_block_bytes{{group="{g}"}}') for g in ("csa", "index", "hca")) / 128
            )
            stored = metric(client, 'thalweg_cache_tier_write_bytes_total{tier="disk"}')
        plain = plain_read_rate(Path(folder))
        kept = sum(path.stat().st_size for path in Path(folder).rglob("*.kv"))
        with running_server("default", *disk) as (client, _):
            warm = answered(client, document)
            read = metric(client, 'thalweg_cache_tier_read_bytes_total{tier="disk"}')
            seconds = metric(client, "thalweg_engine_load_seconds_total")
            from_disk = metric(client, 'thalweg_prompt_tokens_by_source_total{source="disk"}')
    return {
        "context_tokens": cold.prompt_tokens,
        "cold_ttft_seconds": cold.first_token_seconds,
        "disk_ttft_seconds": warm.first_token_seconds,
        "ratio": cold.first_token_seconds / warm.first_token_seconds,
        "disk_tokens": from_disk,
        "same_answer": cold.text == warm.text,
        "stored_bytes": stored,
        "disk_bytes_per_token": kept / from_disk,
        "byte_table_per_token": table,
        "loaded_bytes": read,
        "load_seconds": seconds,
        "load_bytes_per_second": read / seconds,
        "plain_read_bytes_per_second": plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags of thalweg serve")
    options = parser.parse_args()
    document = read_document(options.tokens)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with options.out.open("a") as file:
        for number in range(options.runs):
            facts = {"run": number + 1, "commit": commit.stdout.strip(), "flags": options.flags}
            facts |= run(document, tuple(options.flags.split())) | machine_facts()
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
