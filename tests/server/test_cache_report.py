"""What responses say of the cache: opt-in reports, approximations always; and that every figure adds up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Callable

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.assembly import CountingRunner, Models, Shape, engine_of
from tests.model.fields import FLASH_LIKE
from thalweg.config.options import load_options
from thalweg.engine.engine import Engine
from thalweg.engine.runtime import build_runtime
from thalweg.server.app import create_app
from thalweg.server.service import Service
from thalweg.types import Event, GenerateRequest, TokenEvent

MODEL = "thalweg-tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SOURCES = ("device_tokens", "host_tokens", "disk_tokens", "replayed_tokens", "computed_tokens")
ASKING = {"X-Thalweg-Cache-Report": "1"}


def chat_body(text: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "ignore_eos": True, **fields}


def fresh(words: int = 200) -> str:
    return str(uuid.uuid4()) + " some words" * words


def chunks_of(response: httpx.Response) -> list[dict]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check(report: dict, usage: dict) -> None:
    assert sum(report[name] for name in SOURCES) == report["prompt_tokens"] == usage["prompt_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert report["resume_token"] == cached == sum(report[name] for name in SOURCES[:3])


def test_a_cold_prompt_a_repeated_one_and_one_that_diverges(client: OpenAI) -> None:
    text = fresh()

    def report(text: str) -> dict:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            max_tokens=1,
            extra_body={"return_cache_report": True, "cache_salt": "of this test"},
        )
        check(answer.cache, answer.usage.model_dump())
        return answer.cache

    cold, repeated, other = report(text), report(text), report(text[: len(text) // 2] + fresh())
    assert cold["reason"] == "cold" and cold["computed_tokens"] == cold["prompt_tokens"]
    assert repeated["reason"] == "none" and repeated["divergence_token"] is None
    assert repeated["device_tokens"] == (repeated["prompt_tokens"] - 1) // 128 * 128 > 0
    assert other["reason"] in ("diverged", "no-checkpoint") and 128 < other["divergence_token"] < cold["prompt_tokens"]
    assert {r["approximation"] for r in (cold, repeated, other)} == {None}


def test_only_who_asks_is_told(http: httpx.Client) -> None:
    for path, body in ((CHAT, chat_body("hello")), (COMPLETIONS, {"prompt": "hello", "max_tokens": 2})):
        for headers, field in (({}, None), ({}, False), ({"X-Thalweg-Cache-Report": "0"}, None)):
            response = http.post(path, json={**body, "return_cache_report": field}, headers=headers)
            assert not {"cache", "approximation"} & set(response.json())
            assert not {"x-thalweg-cache", "x-thalweg-approximation"} & set(response.headers)
            stream = chunks_of(http.post(path, json={**body, "stream": True}, headers=headers))
            assert not any("cache" in chunk for chunk in stream)


def test_the_header_asks_and_is_answered_in_headers(http: httpx.Client) -> None:
    body = chat_body(fresh())
    http.post(CHAT, json=body)
    response = http.post(CHAT, json=body, headers=ASKING)
    report = response.json()["cache"]
    check(report, response.json()["usage"])
    said = dict(part.split("=") for part in response.headers["x-thalweg-cache"].split(";"))
    assert said == {
        **{name.removesuffix("_tokens"): str(report[name]) for name in SOURCES},
        "resume": str(report["resume_token"]),
        "divergence": "none",
        "reason": "none",
    }
    assert "x-thalweg-cache" not in http.post(CHAT, json={**body, "return_cache_report": True}).headers


def test_a_stream_says_it_once_per_choice_with_the_finish_reason(http: httpx.Client) -> None:
    for path, body in (
        (CHAT, chat_body(fresh(), n=2)),
        (COMPLETIONS, {"prompt": [fresh(), "short"], "max_tokens": 2, "ignore_eos": True}),
    ):
        whole = http.post(path, json={**body, "return_cache_report": True}).json()
        assert len(whole["cache"]) == len(whole["choices"]) == 2
        chunks = chunks_of(http.post(path, json={**body, "stream": True}, headers=ASKING))
        reporting = [c for c in chunks if "cache" in c]
        assert sorted(c["choices"][0]["index"] for c in reporting) == [0, 1]
        assert all(c["choices"][0]["finish_reason"] for c in reporting)
        for chunk in reporting:
            report = chunk["cache"]
            assert sum(report[name] for name in SOURCES) == report["prompt_tokens"]
            assert report["prompt_tokens"] == whole["cache"][chunk["choices"][0]["index"]]["prompt_tokens"]


def test_several_reports_have_no_header(http: httpx.Client) -> None:
    response = http.post(COMPLETIONS, json={"prompt": ["a", "b b"], "max_tokens": 1}, headers=ASKING)
    assert [r["reason"] for r in response.json()["cache"]] == ["too-short", "too-short"]
    assert "x-thalweg-cache" not in response.headers


def test_wrong_wishes_are_named(http: httpx.Client) -> None:
    for response, param in (
        (http.post(CHAT, json=chat_body("x", return_cache_report="yes")), "return_cache_report"),
        (http.post(CHAT, json=chat_body("x"), headers={"X-Thalweg-Cache-Report": "maybe"}), "x-thalweg-cache-report"),
        (http.post(CHAT, json=chat_body("x", user_id=7)), "user_id"),
        (http.post("/reset_prefix_cache?tiers=device,disc"), "tiers"),
        (http.post("/reset_prefix_cache?tiers="), "tiers"),
        (http.post("/reset_prefix_cache?tier=disk"), "tier"),
    ):
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert "Did you mean 'disk'" in http.post("/reset_prefix_cache?tiers=device,disc").text


def test_only_the_named_tiers_are_reset(http: httpx.Client) -> None:
    body = chat_body(fresh())
    http.post(CHAT, json=body)
    for query in ("?tiers=disk", "?tiers=host,disk", "?tiers=host&tiers=disk"):
        assert http.post(f"/reset_prefix_cache{query}").json() == {"forgotten_tokens": 0}
    assert http.post(CHAT, json=body).json()["usage"]["prompt_cache_hit_tokens"] > 0
    assert http.post("/reset_prefix_cache?tiers=device,host,disk").json()["forgotten_tokens"] > 0
    assert http.post(CHAT, json=body).json()["usage"]["prompt_cache_hit_tokens"] == 0


def test_metrics_have_the_reports_figures(http: httpx.Client) -> None:
    def read(name: str, label: str) -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {s.labels[label]: s.value for f in families for s in f.samples if s.name == name}

    body = chat_body(fresh(), return_cache_report=True)
    before = read("thalweg_prompt_tokens_by_source_total", "source")
    reports = [http.post(CHAT, json=body).json()["cache"] for _ in range(3)]
    after = read("thalweg_prompt_tokens_by_source_total", "source")
    for name in SOURCES:
        source = name.removesuffix("_tokens")
        assert after[source] - before.get(source, 0) == sum(report[name] for report in reports)
    cached, size = read("thalweg_cache_cached_blocks", "group"), read("thalweg_cache_block_bytes", "group")
    assert cached["csa"] > 0
    assert read("thalweg_cache_cached_bytes", "group") == {group: cached[group] * size[group] for group in cached}
    rows = read("thalweg_cache_cached_rows", "group")
    assert rows["csa"] % 32 == 0 and rows["csa"] > cached["csa"]


class Approximating:
    """An engine whose every answer is approximate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.close, self.cancel, self.status, self.limits = engine.close, engine.cancel, engine.status, engine.limits

    def submit(self, request: GenerateRequest, listener: Callable[[Event], None]) -> None:
        def told(event: Event) -> None:
            if isinstance(event, TokenEvent):
                cache = dataclasses.replace(event.usage.cache, replayed_tokens=3, approximation="bounded-replay")
                event = dataclasses.replace(event, usage=dataclasses.replace(event.usage, cache=cache))
            listener(event)

        self._engine.submit(request, told)


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {}), (COMPLETIONS, {"prompt": ["one two", "three"]})])
def test_an_approximation_is_always_named(path: str, prompt: dict) -> None:
    runtime = build_runtime(load_options({"kv_cache_memory": "64MiB"}, environment={}))
    _, plan = Models().runner(FLASH_LIKE, Shape())
    fields = {**FLASH_LIKE, "vocab_size": runtime.model_config.vocab_size}
    engine = Approximating(engine_of(fields, CountingRunner(), plan, Shape()))
    app = create_app(Service(dataclasses.replace(runtime, engine=engine)))
    body = {**(prompt or chat_body("hello")), "max_tokens": 3, "n": 2}

    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post(path, json=body), await client.post(path, json={**body, "stream": True})

    try:
        whole, streamed = asyncio.run(run())
    finally:
        engine.close()
    assert whole.json()["approximation"] == "bounded-replay" == whole.headers["x-thalweg-approximation"]
    assert "cache" not in whole.json()
    chunks = chunks_of(streamed)
    assert chunks and all(chunk["approximation"] == "bounded-replay" for chunk in chunks)
