"""`thalweg demo`: the whole job once, on this machine: serve, read a long document, ask twice, show what it took."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import thalweg
from thalweg.cli.progress import bar, output
from thalweg.errors import ConfigError, UnavailableError
from thalweg.evaluation.endpoint import Client
from thalweg.evaluation.exam import Answer, Asking, ask, model_name
from thalweg.prose.facts import needle_line, question_for
from thalweg.prose.library import library_texts

if TYPE_CHECKING:
    from rich.console import Console

_CHARACTERS_PER_TOKEN = 3.4  # of Python source under the embedded tokenizer, rounded up
_START_SECONDS = 120
_FACTS = {0.35: ("server address", "local host"), 0.7: ("buffer size", "round number")}  # by depth: key and value
_ANSWER_TOKENS = 32


def demo(
    tokens: Annotated[int, typer.Option(help="Least length of the document.")] = 100_000,
    model: Annotated[str, typer.Option(help="Model directory; the embedded default if left out.")] = "default",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Serve the embedded model, read a long real document over HTTP, ask two questions, print a table."""
    console = output()
    document = read_document(tokens)
    try:
        with running_server(model) as (client, process):
            console.print(f"document: {len(document):,} characters of this Python's standard library")
            answers = [
                _ask(client, document, question, console)
                for question in (question_for(key) for key, _ in _FACTS.values())
            ]
            figures = _figures(client, process, answers)
        show_figures(console, figures)
        if json_file is not None:
            json_file.write_text(json.dumps(figures | machine_facts(), indent=2) + "\n")
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)


def read_document(tokens: int) -> str:
    """Source files of this Python's standard library, sorted by path: about so many tokens, with two facts hidden."""
    wanted = int(tokens * _CHARACTERS_PER_TOKEN)
    lines: list[str] = []
    size = 0
    for text in library_texts():
        lines += text.splitlines()
        size += len(text)
        if size >= wanted:
            break
    if size < wanted:
        raise ConfigError(f"this Python has only {size:,} characters of source, {wanted:,} are needed", param="tokens")
    for depth, (key, value) in sorted(_FACTS.items(), reverse=True):
        lines.insert(int(depth * len(lines)), needle_line(key, value).rstrip())
    return "\n".join(lines)


@contextmanager
def running_server(model: str, *flags: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """A real server process on a free port; ended when the block ends, however it ends."""
    command = [sys.executable, "-m", "thalweg", "serve", model, "--port", "0", "--max-num-seqs", "4", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Client(f"http://127.0.0.1:{_ready_port(process)}", os.environ.get("THALWEG_API_KEY")), process
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready_port(process: subprocess.Popen[str]) -> int:
    """Wait for the line that says where the server listens."""
    assert process.stdout is not None and process.stderr is not None, "the server was started without pipes"
    deadline = time.monotonic() + _START_SECONDS
    with bar() as progress:
        progress.add_task("starting the server", total=None)
        while time.monotonic() < deadline:
            line = process.stdout.readline()
            if line.startswith("ready on "):
                return int(line.rsplit(":", 1)[1].split("/")[0])
            if not line:
                raise UnavailableError(f"the server did not start: {process.stderr.read().strip()}")
    raise UnavailableError(f"the server was not ready after {_START_SECONDS} s")


def _ask(client: Client, document: str, question: str, console: Console) -> Answer:
    """One chat request over the document, streamed; a bar while the prompt is read."""
    with bar() as progress:
        task = progress.add_task("sending the document", total=None)
        answer = ask(
            client,
            Asking(model_name(client), _ANSWER_TOKENS),
            f"{document}\n\n{question}",
            lambda done, total: progress.update(task, description="reading", completed=done, total=total),
        )
    show_answer(console, question, answer.text)
    return answer


def show_answer(console: Console, question: str, answer: str) -> None:
    console.print(f"\nQ: {question}\nA: {answer}", markup=False)


def _figures(client: Client, process: subprocess.Popen[str], answers: list[Answer]) -> dict[str, Any]:
    """What the table shows, in plain values."""
    import psutil

    cold, warm = answers
    return {
        "context_tokens": cold.prompt_tokens,
        "cold_ttft_seconds": cold.first_token_seconds,
        "prefill_tokens_per_second": cold.prompt_tokens / cold.first_token_seconds,
        "warm_ttft_seconds": warm.first_token_seconds,
        "warm_cached_tokens": warm.cached_tokens,
        "decode_tokens_per_second": [cold.decode_tokens_per_second, warm.decode_tokens_per_second],
        "cache_bytes": _cache_bytes(client.get("/metrics")),
        "resident_bytes": psutil.Process(process.pid).memory_info().rss,
        "answers": [
            {"question": question_for(key), "expected": value, "answer": answer.text}
            for (key, value), answer in zip(_FACTS.values(), answers, strict=True)
        ],
    }


def machine_facts() -> dict[str, Any]:
    """Where the figures come from."""
    import psutil
    import torch

    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "thalweg": thalweg.__version__,
    }


def show_figures(console: Console, figures: dict[str, Any]) -> None:
    """Print the table of one run's figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("figure", "value", title="one real run", title_justify="left", box=SIMPLE_HEAD)
    warm = f"{figures['warm_ttft_seconds']:,.2f} s ({figures['warm_cached_tokens']:,} tokens from the cache)"
    right = sum(answer["answer"].strip() == answer["expected"] for answer in figures["answers"])
    for name, value in (
        ("right answers", f"{right} of {len(figures['answers'])}"),
        ("context tokens", f"{figures['context_tokens']:,}"),
        ("time to first token, cold", f"{figures['cold_ttft_seconds']:,.2f} s"),
        ("prefill", f"{figures['prefill_tokens_per_second']:,.0f} tokens/s"),
        ("time to first token, warm", warm),
        ("decode", " and ".join(f"{speed:,.0f}" for speed in figures["decode_tokens_per_second"]) + " tokens/s"),
        *((f"cache bytes: {group}", f"{size:,}") for group, size in figures["cache_bytes"].items()),
        ("cache bytes: all", f"{sum(figures['cache_bytes'].values()):,}"),
        ("memory of the server (resident)", f"{figures['resident_bytes'] / 2**20:,.0f} MiB"),
    ):
        table.add_row(name, value)
    console.print()
    console.print(table)


def _cache_bytes(metrics: str) -> dict[str, int]:
    """Bytes that hold cached rows, by group."""
    values: dict[str, dict[str, float]] = {}
    for line in metrics.splitlines():
        name, _, rest = line.partition('{group="')
        if rest and name.startswith("thalweg_cache_"):
            group, _, value = rest.partition('"} ')
            values.setdefault(group, {})[name.removeprefix("thalweg_cache_")] = float(value)
    return {g: int(v["cached_blocks"] * v["block_bytes"]) for g, v in values.items() if v["cached_blocks"]}
