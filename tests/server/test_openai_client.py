"""The real `openai` client against the real server."""

from __future__ import annotations

import asyncio
import re
import runpy
import sys
import uuid
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import Server

MODEL = "thalweg-tiny"
CONTROL = re.compile("<｜.*｜>|</?think>|｜DSML｜|</?dsml:|<.EOT.>")
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "chat_openai.py"


def ask(client: OpenAI, text: str = "hello", **fields):
    fields = {"model": MODEL, "max_tokens": 6, "temperature": 0, **fields}
    fields["extra_body"] = {"ignore_eos": True, **fields.get("extra_body", {})}  # this model likes to be brief
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **fields)


def test_models(client: OpenAI) -> None:
    models = list(client.models.list())
    assert [m.id for m in models] == [MODEL]
    assert models[0].max_model_len > 100_000
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_whole_and_streamed_agree(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_on_every_chunk_where_asked(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 6


def test_a_second_request_hits_the_prefix_cache(client: OpenAI) -> None:
    text = str(uuid.uuid4()) + " some words" * 200
    first, second = ask(client, text).usage, ask(client, text).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // 128 * 128 > 0
    for usage in (first, second):
        assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
        assert usage.prompt_cache_hit_tokens == usage.prompt_tokens_details.cached_tokens


def test_salts_never_share(client: OpenAI) -> None:
    text = str(uuid.uuid4()) + " other words" * 100
    cached = [
        ask(client, text, extra_body={"cache_salt": salt}).usage.prompt_tokens_details.cached_tokens
        for salt in ("a", "b", "a")
    ]
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_seeds_reproduce(client: OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = ask(client, temperature=1.0, seed=seed, n=3, max_tokens=8)
        return [c.message.content for c in answer.choices]

    assert draw(5) == draw(5) != draw(2**70)
    assert len(set(draw(5))) == 3


def test_several_choices_share_one_prompt_in_usage(client: OpenAI) -> None:
    one, three = ask(client, n=1), ask(client, n=3)
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 18
    assert [c.index for c in three.choices] == [0, 1, 2]
    chunks = [c for c in ask(client, n=2, stream=True) if c.choices]
    assert {c.choices[0].index for c in chunks} == {0, 1}
    assert sum(c.choices[0].finish_reason is not None for c in chunks) == 2


def test_logprobs(client: OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=2).choices[0]
    assert len(choice.logprobs.content) == 6
    for token in choice.logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
    data = b"".join(bytes(t.bytes) for t in choice.logprobs.content if not CONTROL.fullmatch(t.token))
    assert data.decode("utf-8", "replace") == choice.message.content
    streamed = [t for c in ask(client, logprobs=True, stream=True) for t in (c.choices[0].logprobs or _none).content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in choice.logprobs.content], abs=1e-4)


class _none:
    content = ()


def test_completions(client: OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="def main(", max_tokens=5, temperature=0, logprobs=1)
    choice = text.choices[0]
    assert len(choice.logprobs.tokens) == 5 and choice.logprobs.text_offset[0] == 0
    assert choice.logprobs.text_offset == [sum(map(len, choice.logprobs.tokens[:i])) for i in range(5)]
    streamed = client.completions.create(model=MODEL, prompt="def main(", max_tokens=5, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    many = client.completions.create(model=MODEL, prompt=["a", "b b b"], max_tokens=2, temperature=0, n=2)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    single = [client.completions.create(model=MODEL, prompt=p, max_tokens=2) for p in ("a", "b b b")]
    assert many.usage.prompt_tokens == sum(s.usage.prompt_tokens for s in single)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=["a", "b b b"], max_tokens=2, temperature=0, n=2, stream=True, stream_options=options
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage == many.usage == chunks[-2].usage
    ids = client.completions.create(model=MODEL, prompt=[0, 400, 401], max_tokens=3, temperature=0)
    assert ids.usage.prompt_tokens == 3


def test_stop_strings_cut_anywhere(client: OpenAI) -> None:
    whole = ask(client, max_tokens=24).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = ask(client, max_tokens=24, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 24
    late = ask(client, max_tokens=24, stop=[stop], extra_body={"min_tokens": 24})
    assert late.choices[0].finish_reason in ("length", "stop") and late.usage.completion_tokens == 24
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, max_tokens=24, stop=stop, stream=True))
    assert streamed == whole[: whole.find(stop)]


def test_ignore_eos_gives_exactly_max_tokens(client: OpenAI) -> None:
    answer = ask(client, temperature=1.5, seed=1, max_tokens=60, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 60
    assert ask(client, max_tokens=1).usage.completion_tokens == 1


def test_thinking_mode_gives_reasoning(client: OpenAI) -> None:
    answer = ask(client, extra_body={"thinking": {"type": "enabled"}})
    assert answer.choices[0].message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens == 6
    kwargs = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert kwargs.choices[0].message.reasoning_content == answer.choices[0].message.reasoning_content


def test_tools_and_their_results_are_part_of_the_prompt(client: OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    plain, with_tools = ask(client), ask(client, tools=tools)
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens + 100
    assert ask(client, tools=tools, tool_choice="none").usage.prompt_tokens == plain.usage.prompt_tokens
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "go"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=3)
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"temperature": 3}, "temperature"), ({"max_tokens": 10**8}, "max_tokens"), ({"n": 99}, "n")],
)
def test_errors_reach_the_client_with_their_field(client: OpenAI, fields: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        ask(client, model="other")


def test_many_clients_at_once(server: Server) -> None:
    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

            async def one(i: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"{i % 3} " * 40}],
                    max_tokens=8,
                    temperature=0,
                    stream=True,
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(i) for i in range(12)))

    answers = asyncio.run(run())
    assert all(answers[i] == answers[i % 3] for i in range(12))
    server.wait_idle()


def test_the_example_runs(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["chat_openai.py", f"{server.url}/v1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "prompt tokens" in capsys.readouterr().out
