"""Our own server, measured from outside: what is known of it must come out, also after kill -9 in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import run
from tests.server.conftest import Server, start
from thalweg.profiler.profile import Profile

SMALL = ("--quick", "--contexts", "256,1k,2k", "--samples", "2")


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    server = start("--kv-cache-memory", "8MiB", "--kv-host-memory", "0", "--max-model-len", "16384")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def measured(own: Server, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("profile")
    stages = ("--stages", "surfaces,checks,company,load")
    shown = run("profile", own.url, "--out", str(folder), "--budget", "60s", *SMALL, *stages)
    assert "time to first token by prompt tokens" in shown
    return Profile.load(folder / "profile.json")


@pytest.fixture(scope="module")
def filled(own: Server, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("cache")
    flags = ("--stages", "cache", "--fill", "100k", "--fill-lengths", "512", "--no-holdout", "--budget", "200s")
    run("profile", own.url, "--out", str(folder), *SMALL, *flags)
    return Profile.load(folder / "profile.json")


def test_it_says_who_was_measured(measured: Profile) -> None:
    facts = measured.endpoint
    assert facts.model == "thalweg-tiny" and facts.api == "completions"
    assert facts.usage_reported and facts.cached_tokens_reported and facts.output_length_forced
    assert facts.stated_capacity_tokens and facts.notes == ()


def test_cold_is_slower_than_warm(measured: Profile) -> None:
    cold, warm = measured.ttft(2048, 0.0), measured.ttft(2048, 1.0)
    assert cold.value > 2 * warm.value
    for cell in measured.ttft_cells:
        assert cell.reuse == pytest.approx(cell.row, abs=0.06)
        assert cell.cached_tokens is not None
        assert cell.cached_tokens <= cell.reuse * cell.context_tokens + 1
        assert (cell.cached_tokens == 0) == (cell.reuse == 0) or cell.context_tokens * cell.reuse < 700
    assert {cell.batch for cell in measured.tpot_cells} == {1, 4}


def test_the_unit_and_the_capacity_are_ours(filled: Profile) -> None:
    stated, cache = filled.endpoint.stated_capacity_tokens, filled.cache
    assert cache.enabled
    assert cache.unit_tokens == 128
    assert cache.shortest_hit_tokens is not None and 128 < cache.shortest_hit_tokens < 144
    assert cache.lag_tokens is not None and cache.lag_tokens < 4 * 128 + 2 * 128, "layers x window, and a unit"
    assert [fill.evicted for fill in cache.fills] == [True]
    assert stated is not None
    assert 0.4 * stated < cache.fills[0].held_tokens <= 1.01 * stated, "short prompts are limited by checkpoints too"
    assert cache.retained[0].share > 0.9, "nothing goes while nothing else comes"


def test_answers_are_the_same_however_they_are_asked_for(measured: Profile) -> None:
    assert {(c.what, c.remainder) for c in measured.checks} == {
        (w, r) for w in ("needle", "continuation") for r in range(4)
    }
    assert all(check.equal for check in measured.checks)
    assert all(check.found for check in measured.checks)
    assert any(check.cached_tokens for check in measured.checks)


def test_a_killed_measurement_goes_on(own: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thalweg", "profile", own.url, "--out", str(tmp_path), "--quick", "--seed", "5"]
    command += ["--contexts", "256,768", "--samples", "2", "--stages", "surfaces", "--no-holdout"]
    samples = tmp_path / "samples.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not samples.exists() or samples.read_bytes().count(b"\n") < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = samples.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    samples.write_bytes(whole + b'{"key": "ttft/256#1", "samp')
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = samples.read_bytes()
    assert after.startswith(whole), "what was measured stays"
    keys = [json.loads(line).get("key") for line in after.splitlines()]
    assert len(set(keys)) == len(keys)
    found = Profile.load(tmp_path / "profile.json")
    assert not found.left_out
    assert {cell.row for cell in found.ttft_cells} == {0.0, 0.5, 0.9, 1.0}
    assert min(len(cell.seconds) for cell in found.ttft_cells) >= 2
