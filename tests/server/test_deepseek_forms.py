"""DeepSeek's own forms: paths, continued answers, filling in the middle; and what completions add."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.server.conftest import Server
from thalweg.server.schemas import WITHOUT_EFFECT
from thalweg.text.markers import FILL_MARKERS

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hello"}
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "http-api.md"


def rendered(http: httpx.Client, messages: list[dict]) -> str:
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    return http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_a_prefix_is_continued_at_both_paths(http: httpx.Client) -> None:
    messages = [HELLO, {"role": "assistant", "content": "I think that", "prefix": True}]
    assert rendered(http, messages).endswith("I think that")
    body = {"messages": messages, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answers = [
        http.post(path, json=body).json() for path in (CHAT, "/beta/chat/completions", "/beta/v1/chat/completions")
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1] == texts[2] and not texts[0].startswith("I think that")
    middle = http.post(CHAT, json={"messages": [messages[1], HELLO]})
    assert middle.status_code == 400 and middle.json()["error"]["param"] == "messages[0].prefix"


def test_reasoning_of_earlier_turns(http: httpx.Client) -> None:
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "a thought"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body: dict[str, Any] = {"messages": [HELLO, turn, HELLO], "max_tokens": 1, "thinking": {"type": "enabled"}}
    plain, kept, with_tools = (
        http.post(CHAT, json={**body, **more}).json()["usage"]["prompt_tokens"]
        for more in ({}, {"chat_template_kwargs": {"drop_thinking": False}}, {"tools": tools})
    )
    assert plain < kept < with_tools


def test_filling_in_the_middle(http: httpx.Client, server: Server) -> None:
    prompt, suffix = "def fib(a):<｜fim▁hole｜>\n", "    return fib(a - 1)"
    ids = {text: http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in (prompt, suffix)}
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    filled = http.post("/beta/completions", json={"prompt": prompt, "suffix": suffix, **fields}).json()
    begin, hole, end = (special(http, marker) for marker in FILL_MARKERS)
    bos = ids[prompt][0]
    by_hand = [bos, begin, *ids[prompt][1:], hole, *ids[suffix][1:], end]
    same = http.post("/v1/completions", json={"prompt": by_hand, **fields}).json()
    assert filled["choices"][0]["text"] == same["choices"][0]["text"]
    assert filled["usage"]["prompt_tokens"] == len(by_hand)
    client = OpenAI(base_url=f"{server.url}/beta", api_key="x")
    stream = client.completions.create(
        model="thalweg-tiny", prompt=prompt, suffix=suffix, max_tokens=6, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == filled["choices"][0]["text"]
    refused = http.post("/completions", json={"prompt": [1, 2], "suffix": "x"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"


def special(http: httpx.Client, marker: str) -> int:
    """The id of a control token, found by what ids say."""
    return next(i for i in range(2048) if http.post("/detokenize", json={"tokens": [i]}).json()["prompt"] == marker)


def test_echo_shows_the_prompt_first(http: httpx.Client, client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    plain = http.post("/v1/completions", json={"prompt": ["one", "two"], "n": 2, **fields}).json()["choices"]
    echoed = http.post("/v1/completions", json={"prompt": ["one", "two"], "n": 2, "echo": True, **fields}).json()
    assert [c["text"] for c in echoed["choices"]] == [
        prompt + c["text"] for prompt, c in zip(["one", "one", "two", "two"], plain, strict=True)
    ]
    stream = client.completions.create(
        model="thalweg-tiny", prompt="one", max_tokens=4, temperature=0, echo=True, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == echoed["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"best_of": 1}, 200),
        ({"best_of": 2, "n": 2}, 200),
        ({"best_of": 3, "n": 2}, 400),
        ({"echo": True, "logprobs": 1}, 400),
    ],
)
def test_fields_of_completions(http: httpx.Client, fields: dict, status: int) -> None:
    response = http.post("/completions", json={"prompt": "x", "max_tokens": 1, **fields})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] in fields


def test_other_spellings_of_paths(http: httpx.Client) -> None:
    assert http.get("/models").json()["data"][0]["id"] == http.get("/v1/models").json()["data"][0]["id"]
    assert http.get("/health/ready").json() == {"status": "ready"}
    assert http.post("/flush_cache").json().keys() == {"forgotten_tokens"}


@pytest.mark.parametrize("api", WITHOUT_EFFECT)
def test_fields_without_effect_are_documented_and_taken(http: httpx.Client, api: str) -> None:
    line = re.search(rf"^\| {api} \|(.*)\|$", DOCUMENT.read_text(), re.MULTILINE)
    assert line is not None
    assert tuple(re.findall(r"`(\w+)`", line[1])) == WITHOUT_EFFECT[api]
    path, body = {
        "chat": (CHAT, {"messages": [HELLO], "max_tokens": 1}),
        "completions": ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        "messages": ("/v1/messages", {"messages": [HELLO], "max_tokens": 1}),
        "responses": ("/v1/responses", {"input": "x", "max_output_tokens": 1}),
    }[api]
    given = dict.fromkeys(WITHOUT_EFFECT[api], "anything")
    assert http.post(path, json={**body, **given}).status_code == 200


@pytest.mark.parametrize("chat", [True, False])
def test_the_first_chunk_with_choices_has_the_first_token(http: httpx.Client, chat: bool) -> None:
    """Every token's chunk says how many there are so far: the first one says one."""
    body: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    body |= {"messages": [HELLO]} if chat else {"prompt": "hello"}
    with http.stream("POST", CHAT if chat else "/v1/completions", json=body) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: ") and '"choices":[{' in line)
    assert '"completion_tokens":1,' in first
