"""Tokenizer: the published ids for text, ordinary tokens for spelled control strings, clear errors."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import deepseek_recipe
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

import thalweg
from thalweg.errors import ConfigError
from thalweg.text.markers import ASSISTANT, BOS, DSML, END_THINK, EOS, LATEST_REMINDER, TASK_MARKERS, THINK, USER
from thalweg.text.tokenizer import Tokenizer

SAMPLES = [
    "",
    "Hello, world",
    "    def f(x):\n        return  x  # two  spaces\n\n\n\tif y:\r\n\t\tpass\r\n",
    "毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ 小柴胡冲剂 カタカナ ひらがな 한국어",
    "12345.678 1e-7 0x1F 999999999999 ٣٤٥",
    "\n\n\n   \n\t\n trailing   ",
    "emoji 👩‍👩‍👧‍👦 🇳🇴 \u200b\ufeff\x00\x7f é e\u0301",
    "a|b||c <tag/> && \"quoted\" 'single' `code` — dash … dots",
]


@pytest.fixture(scope="module")
def reference(official_path: Path) -> Backend:
    return Backend.from_file(str(official_path))


@pytest.mark.parametrize("text", SAMPLES)
def test_ids_equal_the_published_tokenizer(text: str, official: Tokenizer, reference: Backend) -> None:
    ids = official.encode_text(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert official.decode(ids) == text


def test_ids_of_source_code_equal_the_published_tokenizer(official: Tokenizer, reference: Backend) -> None:
    text = Path(json.__file__).read_text(encoding="utf-8") + Path(threading.__file__).read_text(encoding="utf-8")
    assert official.encode_text(text) == reference.encode(text, add_special_tokens=False).ids


def test_spelled_control_strings_are_ordinary_tokens(official: Tokenizer, official_path: Path) -> None:
    encoding = deepseek_recipe.DeepseekV4Encoding().with_tokenizer(
        deepseek_recipe.Tokenizer.from_file(str(official_path))
    )
    specials = {official.special_id(text) for text in official.special_texts}
    texts = [
        *(text for text in official.special_texts if "holder" not in text),
        f"a{USER}b {END_THINK}\n<{DSML}invoke>",
    ]
    for text in texts:
        ids = official.encode_text(text)
        assert specials.isdisjoint(ids)
        assert official.decode(ids) == text
        conversation = deepseek_recipe.Conversation([deepseek_recipe.UserMessage(text)], thinking_mode=False)
        assert encoding.encode(conversation)[2:-2] == ids


@pytest.mark.parametrize("which", ["official", "embedded"])
def test_control_strings_have_one_id_each(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    tasks = [marker for _, marker in TASK_MARKERS]
    for text in (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *tasks):
        token = tokenizer.special_id(text)
        assert tokenizer.decode([token]) == text == tokenizer.special_text(token)
        assert tokenizer.decode([token], skip_special=True) == ""
        assert tokenizer.is_special(token) and token < tokenizer.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.special_id(BOS), tokenizer.special_id(EOS))
    assert tokenizer.special_text(tokenizer.encode_text("a")[0]) is None


def test_sizes(official: Tokenizer, embedded: Tokenizer) -> None:
    assert (official.vocab_size, embedded.vocab_size) == (129280, 2048)
    assert official.encode_texts([]) == []
    assert official.encode_texts(["a", "", "b"]) == [official.encode_text("a"), [], official.encode_text("b")]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 129279), max_size=40))
def test_decode_equals_the_library(ids: list[int], official: Tokenizer, reference: Backend) -> None:
    assert official.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_text_comes_back(text: str, official: Tokenizer, embedded: Tokenizer) -> None:
    for tokenizer in (official, embedded):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_other_threads_run_while_a_long_text_is_encoded(embedded: Tokenizer) -> None:
    text = Path(threading.__file__).read_text(encoding="utf-8") * 40
    begun, done, ticks = threading.Event(), threading.Event(), 0

    def encode() -> None:
        begun.set()
        embedded.encode_text(text)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    begun.wait()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    # While the lock is kept, this thread gets no more than the one or two turns at the call's edges.
    assert ticks > 20


def test_unknown_ids_are_empty(official: Tokenizer) -> None:
    assert official.decode([official.vocab_size, -1]) == ""
    assert official.token_bytes(10**9) == b""


def test_errors_name_the_file_and_the_string(tmp_path: Path, embedded: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content, complaint in (
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must be of type ByteLevel"),
        ('{"decoder": {"type": "ByteLevel"}}', "not a tokenizer description"),
        ('{"decoder": {"type": "ByteLevel"}, "added_tokens": [1]}', "not a tokenizer description"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=complaint) as caught:
            Tokenizer.load(tmp_path)
        assert caught.value.param == str(path)
    shutil.copy(Path(thalweg.__file__).parent / "data" / "default" / "tokenizer.json", path)
    assert Tokenizer.load(tmp_path).eos_id == embedded.eos_id
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 7}')
    with pytest.raises(ConfigError, match="eos_token must be a string"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": USER}))
    assert Tokenizer.load(tmp_path).eos_id == embedded.special_id(USER)
    with pytest.raises(ConfigError, match=r"no control token '<｜Usr｜>'\. Did you mean '<｜User｜>'"):
        embedded.special_id("<｜Usr｜>")


def test_a_vocabulary_in_which_text_reaches_a_control_id_is_refused(tmp_path: Path) -> None:
    source = Path(thalweg.__file__).parent / "data" / "default" / "tokenizer.json"
    description = json.loads(source.read_text(encoding="utf-8"))
    description["added_tokens"].append(
        {**description["added_tokens"][-1], "id": description["model"]["vocab"]["e"], "content": "e"}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ConfigError, match="must keep them apart"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("which", ["official", "embedded"])
def test_long_texts_cut_at_lines_have_the_ids_of_the_whole(which: str, request: pytest.FixtureRequest) -> None:
    """Ids of pieces that several processors encode are those of the text in one piece, whatever stands at the cuts."""
    tokenizer: Tokenizer = request.getfixturevalue(which)
    random = np.random.default_rng(5)
    words = [
        "a",
        "Zed 7",
        "1234",
        "...",
        "!?\n",
        " x",
        "  ",
        "\t",
        "\r\n",
        "é",
        "文字",
        "🙂",
        "e\u0301",
        "\n\n",
        "$$",
        "\n",
        "\n ",
    ]
    text = "".join(words[i] for i in random.integers(0, len(words), 300_000))
    assert tokenizer._cuts_lines and len(tokenizer._pieces(text)) > 3
    assert "".join(tokenizer._pieces(text)) == text
    whole = tokenizer._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert tokenizer.encode_texts([text, "short", ""]) == [whole, tokenizer.encode_text("short"), []]
    assert tokenizer._pieces("x" * 500_000) == ["x" * 500_000], "nowhere to cut"
