"""The embedded model finds what it was given: through the real server, over real text, at every alignment and edge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.commands import run
from tests.server.conftest import start


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = start("--max-num-batched-tokens", "2048", "--kv-cache-memory", "1GiB")
    yield server.url
    server.process.terminate()
    assert server.process.wait(10) is not None


def needle(url: str, *flags: str) -> dict[str, Any]:
    return json.loads(run("eval", "needle", "--url", url, "--json", *flags))


@pytest.mark.parametrize("context", ["1k", "4k", "16k", "64k"])
def test_single_needles(url: str, context: str) -> None:
    facts = needle(url, "--context", context, "--questions", "32", "--seed", "11")
    assert facts["questions"] == 32
    assert facts["right"] >= 31, facts["wrong"]
    assert facts["exact"] == facts["right"]
    tokens = {"1k": 1024, "4k": 4096, "16k": 16384, "64k": 65536}[context]
    assert facts["prompt_tokens"] == [tokens - 16]
    assert [asked for _, asked in facts["by_alignment"]] == [8, 8, 8, 8]


def test_needles_in_the_served_byte_formats() -> None:
    """FP8 KV rows and FP4 index keys: 88 and 34 bytes where float32 takes 256 each."""
    flags = ("--max-num-batched-tokens", "2048", "--kv-cache-dtype", "fp8", "--index-cache-dtype", "fp4")
    server = start(*flags)
    facts = needle(server.url, "--context", "4k", "--questions", "8", "--seed", "15")
    server.process.terminate()
    assert server.process.wait(10) is not None
    assert facts["questions"] == facts["right"] == 8, facts["wrong"]


def test_forks_of_one_document_are_read_once(url: str) -> None:
    facts = needle(url, "--context", "8k", "--questions", "9", "--seed", "12")
    shared = (8192 - 16 - 16) // 128 * 128
    assert facts["documents"] == 1
    assert facts["cached_tokens"] >= 8 * (shared - 128)


@pytest.mark.parametrize("context", ["2k", "8k"])
def test_needles_on_edges(url: str, context: str) -> None:
    facts = needle(url, "--context", context, "--questions", "24", "--place", "edges", "--seed", "13")
    assert set(facts["by_place"]) >= {"first", "last", "window", "unit"}
    assert facts["right"] >= 23, facts["wrong"]


def test_distractors(url: str) -> None:
    flags = ("--context", "16k", "--questions", "32", "--task", "multi-key", "--distractors", "160", "--seed", "14")
    facts = needle(url, *flags)
    assert facts["right"] >= 30, facts["wrong"]


def test_the_table_for_people(url: str) -> None:
    text = run("eval", "needle", "--url", url, "--context", "2k", "--questions", "8")
    assert "accuracy 1.0000 (8/8)" in text
    assert "position = 3 mod 4" in text
    assert "prompts of 2,032 tokens" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--context", "lots"), "--context 'lots' is not a number of tokens"),
        (("--task", "riddle"), "--task 'riddle' is none of single, multi-key"),
        (("--place", "top"), "--place 'top' is none of even, edges"),
        (("--url", "ftp://here"), "'ftp://here' is no address such as"),
        (("--url", "http://127.0.0.1:1"), "127.0.0.1:1 does not answer"),
        (("--tokenizer", "/nowhere"), "cannot read /nowhere/tokenizer.json"),
        (("--model", "gpt"), "no model 'gpt' here"),
        (("--context", "2m"), "exceed max_model_len, 1048576 tokens"),
    ],
)
def test_what_cannot_be_asked(url: str, flags: tuple[str, ...], message: str) -> None:
    rest = () if "--context" in flags else ("--context", "1k")
    address = () if "--url" in flags else ("--url", url)
    assert message in run("eval", "needle", *address, *rest, *flags, ok=False)
