"""/live, the history behind it, and the request log: what is told to whom, and that none of it grows."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Server, start
from thalweg.errors import EngineError
from thalweg.metrics.finished import FinishedRequest
from thalweg.metrics.prometheus import EngineGauges, RequestMetrics
from thalweg.metrics.vllm_names import ModelLabels
from thalweg.server.access import Caller
from thalweg.server.history import MOST_FINISHED, History
from thalweg.server.record import RequestRecord
from thalweg.server.request_log import LineWriter, log_fields
from thalweg.types import CacheReport, GenerateRequest, MissReason, PrefillProgress, Timeline, Usage

ALICE, BOB = "alice-key-0123456", "bob-key-0123456789"
SOURCES = ("device", "host", "disk", "replayed", "computed")
VLLM = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc",
    "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "cache_config_info", "request_success_total", "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket", "time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
    "request_inference_time_seconds_bucket", "request_time_per_output_token_seconds_bucket",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
)  # fmt: skip


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def usage(timeline: Timeline | None = None, output: int = 0) -> Usage:
    cache = CacheReport(device_tokens=256, host_tokens=128, replayed_tokens=16, reason=MissReason.DIVERGED)
    return Usage(1000, output, cache, 1, timeline)


def metrics() -> RequestMetrics:
    return RequestMetrics(lambda: EngineGauges(0, 0, (), {}), ModelLabels("m", 128, 1000, "float32"))


@dataclasses.dataclass
class Watched:
    """A record with everything around it."""

    record: RequestRecord
    clock: Clock
    ended: list[FinishedRequest]
    timelines: dict[str, Timeline]
    metrics: RequestMetrics


@pytest.fixture
def watched(prompt: Callable[[int], GenerateRequest]) -> Watched:
    clock, ended, timelines, sink = Clock(), [], {}, metrics()
    record = RequestRecord(
        prompt(1000), Caller("alice", "a"), sink, lambda _, f: ended.append(f), lambda: timelines, clock
    )
    return Watched(record, clock, ended, timelines, sink)


@pytest.fixture
def prompt() -> Callable[[int], GenerateRequest]:
    import numpy as np

    return lambda tokens: GenerateRequest("id", np.zeros(tokens, np.int32))


def values(exposition: bytes) -> dict[str, float]:
    """Of samples that carry nothing but what every sample of vLLM's does; others under `name{value}`."""
    found = {}
    for family in text_string_to_metric_families(exposition.decode()):
        for sample in family.samples:
            own = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            found[sample.name + (f"{{{','.join(own)}}}" if own else "")] = sample.value
    return found


def test_a_timeline_from_arrival_to_end(watched: Watched) -> None:
    record, clock = watched.record, watched.clock
    clock.now = 102.0
    assert record.spans() == (2.0, 0.0, 0.0)
    watched.timelines["id"] = Timeline(100.0, loading=101.5)
    clock.now = 103.0
    assert record.spans() == (1.5, 1.5, 0.0)
    watched.timelines["id"] = told = Timeline(100.0, loading=101.5, started=103.5)
    clock.now = 105.0
    record.progressed(PrefillProgress("id", 700, 1000))
    assert record.spans() == (1.5, 2.0, 1.5) and record.done_tokens == 700
    record.produced(1, usage(told, 1))
    clock.now = 106.0
    record.produced(1, usage(told, 2))
    clock.now = 108.0
    record.ended("length", usage(told, 2))
    record.abandoned()
    (finished,) = watched.ended
    assert (finished.queue_seconds, finished.load_seconds, finished.prefill_seconds) == (1.5, 2.0, 1.5)
    assert finished.decode_seconds == finished.token_seconds == 3.0 and finished.seconds == 8.0
    shown = values(watched.metrics.exposition())
    for prefix in ("thalweg_", "vllm:"):
        assert shown[f"{prefix}request_queue_time_seconds_sum"] == 3.5
        assert shown[f"{prefix}request_prefill_time_seconds_sum"] == 1.5
        assert shown[f"{prefix}request_decode_time_seconds_sum"] == 3.0
        assert shown[f"{prefix}time_to_first_token_seconds_sum"] == 5.0
        assert shown[f"{prefix}inter_token_latency_seconds_sum"] == 1.0
        assert shown[f"{prefix}prompt_tokens_total"] == shown[f"{prefix}prefix_cache_queries_total"] == 1000
        assert shown[f"{prefix}prefix_cache_hits_total"] == 384 and shown[f"{prefix}generation_tokens_total"] == 2
    assert shown["vllm:request_success_total{length}"] == shown["thalweg_requests_finished_total{length}"] == 1


def test_who_leaves_or_fails_before_any_output_has_a_record_too(watched: Watched) -> None:
    watched.timelines["id"] = Timeline(100.0, started=100.5)
    watched.record.progressed(PrefillProgress("id", 128, 1000))
    watched.timelines.clear()
    watched.clock.now = 103.0
    watched.record.abandoned()
    watched.record.ended("error", usage(), EngineError("late"))
    (finished,) = watched.ended
    assert finished.reason == "cancelled" and finished.miss_reason is None and not finished.prompt_sources
    assert (finished.queue_seconds, finished.prefill_seconds, finished.seconds) == (0.5, 2.5, 3.0)
    shown = values(watched.metrics.exposition())
    assert shown["vllm:request_success_total{abort}"] == 1
    assert shown["vllm:request_queue_time_seconds_count"] == shown["vllm:prompt_tokens_total"] == 0


def test_an_error_is_named_in_the_log(watched: Watched) -> None:
    watched.record.ended("error", usage(), EngineError("the step failed: secret text"))
    fields = log_fields(watched.ended[0])
    assert fields["error"] == "engine_error" and fields["finish_reason"] == "error" and fields["caller"] == "alice"
    assert "secret" not in json.dumps(fields)


def test_the_history_is_bounded_and_kept_by_tenant(prompt: Callable[[int], GenerateRequest]) -> None:
    history, sink = History(), metrics()
    for place in range(3 * MOST_FINISHED):
        request = dataclasses.replace(prompt(1000), request_id=str(place))
        caller = Caller("alice", "a") if place else Caller("bob", "b")
        record = RequestRecord(request, caller, sink, history.ended, dict)
        history.begun(record)
        record.produced(1, usage(output=1))
        record.ended("stop", usage(output=1))
    ledger = history.ledger("a")
    assert len(ledger.finished) == MOST_FINISHED and not ledger.open
    assert ledger.reasons == {"diverged": 3 * MOST_FINISHED - 1}
    assert sum(ledger.sources.values()) == 1000 * (3 * MOST_FINISHED - 1)
    assert [f.request_id for f in history.ledger("b").finished] == ["0"]


def test_a_stuck_reader_of_the_log_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    writer = LineWriter(writing)
    line = logging.LogRecord("thalweg.requests", logging.INFO, "", 0, "x" * 1000, None, None)
    begin = time.monotonic()
    for _ in range(20_000):
        writer.emit(line)
    assert time.monotonic() - begin < 20
    received = bytearray()
    reader = threading.Thread(
        target=lambda: [received.extend(os.read(reading, 2**20)) for _ in iter(int, 1)], daemon=True
    )
    reader.start()
    deadline = time.monotonic() + 60
    while b"dropped_lines" not in received and time.monotonic() < deadline:
        writer.emit(line)
        writer.flush()
    assert b'{"dropped_lines":' in received and received.count(b"\n") < 15_000


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Server:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[keys]\nalice = "{ALICE}"\nbob = "{BOB}"\n')
    file.chmod(0o600)
    server = start("--api-keys-file", str(file))
    yield server
    if server.process.poll() is None:
        server.process.terminate()
        server.process.wait(20)


def chat(server: Server, key: str, text: str, **fields: object) -> str:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "ignore_eos": True, **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": key}, timeout=120)
    return answer.json()["id"]


def test_live_tells_each_caller_its_own_and_the_log_has_a_line_of_each(guarded: Server) -> None:
    text = "a private word or two " * 100
    ids = {key: [chat(guarded, key, text) for _ in range(2)] for key in (ALICE, BOB)}
    assert httpx.get(f"{guarded.url}/live").status_code == 401
    for key, name in ((ALICE, "alice"), (BOB, "bob")):
        response = httpx.get(f"{guarded.url}/live", headers={"x-api-key": key})
        told = response.json()
        assert told["caller"] == name and told["totals"]["ended"] == {"length": 2}
        assert [f["id"] for f in told["finished"]] == [f"{i}-0" for i in reversed(ids[key])]
        last = told["finished"][0]
        assert sum(last["sources"].values()) == last["prompt_tokens"] and last["sources"]["device"] > 0
        assert sum(last["seconds"].values()) == pytest.approx(
            last["ttft_seconds"] + last["seconds"]["decode"], abs=1e-3
        )
        for group in told["groups"]:
            assert group["free"] + group["idle"] + group["in_use"] == group["total"]
            assert 0 <= group["shared"] <= group["in_use"]
        assert "private" not in response.text and ALICE not in response.text
        assert response.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in response.headers["content-security-policy"]
    guarded.process.terminate()
    guarded.process.wait(20)
    log = guarded.process.stderr.read()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert [line["id"] for line in lines] == [f"{i}-0" for key in (ALICE, BOB) for i in ids[key]]
    for line in lines:
        assert sum(line[f"{source}_tokens"] for source in SOURCES) == line["prompt_tokens"]
        spans = sum(line[f"{span}_seconds"] for span in ("queue", "load", "prefill", "decode"))
        assert spans == pytest.approx(line["total_seconds"], abs=1e-4) and line["output_tokens"] == 3
        assert line["caller"] in ("alice", "bob") and line["error"] is None
    assert [line["miss_reason"] for line in lines] == ["cold", "none", "cold", "none"]
    assert "private" not in log and ALICE not in log


def test_the_page_is_open_and_strict(server: Server) -> None:
    for path in ("/", "/page/live.js", "/page/draw.js", "/page/live.css", "/page/icon.svg"):
        response = httpx.get(server.url + path)
        assert response.status_code == httpx.head(server.url + path).status_code == 200
        assert "'unsafe" not in response.headers["content-security-policy"]
        assert not any(host in response.text for host in ("https://", "//cdn")), path
    assert httpx.get(f"{server.url}/page/../engine.py").status_code == 404
    script = httpx.get(f"{server.url}/page/live.js").text
    assert not any(word in script for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("))


def test_names_of_vllm_have_its_labels_and_our_values(server: Server, http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "one two three", "max_tokens": 3})
    families = list(text_string_to_metric_families(http.get("/metrics").text))
    samples = [s for f in families for s in f.samples]
    theirs = {s.name: s for s in samples if s.name.startswith("vllm:")}
    assert {f"vllm:{name}" for name in VLLM} <= set(theirs)
    assert all(s.labels["model_name"] == "thalweg-tiny" and s.labels["engine"] == "0" for s in theirs.values())
    shown = values(http.get("/metrics").content)
    assert shown["vllm:prompt_tokens_total"] == sum(
        shown[f"thalweg_prompt_tokens_by_source_total{{{s}}}"] for s in SOURCES
    )
    info = theirs["vllm:cache_config_info"].labels
    told = httpx.get(f"{server.url}/live").json()["about"]
    assert int(info["block_size"]) * int(info["num_gpu_blocks"]) == told["cache_tokens"]


def test_the_flags_that_users_of_other_engines_type() -> None:
    from typer.testing import CliRunner

    from thalweg.cli.main import app

    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert "--no-enable-log-requests" in shown and "--disable-log-requests" in shown
