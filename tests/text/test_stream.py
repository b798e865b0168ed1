"""Incremental decoding and stop strings against the same thing done on the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.text.stream import StopMatcher, TokenStream
from thalweg.text.tokenizer import Tokenizer

TOKEN_IDS = st.lists(st.one_of(st.integers(0, 129279), st.integers(0, 300), st.integers(128800, 128850)), max_size=60)


@settings(max_examples=400, deadline=None)
@given(ids=TOKEN_IDS)
def test_pieces_joined_equal_decoding_the_whole(ids: list[int], official: Tokenizer) -> None:
    stream = TokenStream(official)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == official.decode(ids)
    assert stream.push_all(ids) + stream.flush() == official.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_valid_text_never_shows_a_replacement_character(text: str, official: Tokenizer, embedded: Tokenizer) -> None:
    for tokenizer in (official, embedded):
        stream = TokenStream(tokenizer)
        shown = ""
        for token in tokenizer.encode_text(text):
            shown += stream.push(token)
            assert text.startswith(shown)
        assert shown == text and stream.flush() == ""


def test_an_emoji_is_held_back_until_complete(embedded: Tokenizer) -> None:
    ids = embedded.encode_text("🦉")
    assert len(ids) > 1
    stream = TokenStream(embedded)
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🦉"]
    stream = TokenStream(embedded)
    assert stream.push_all(ids[:-1]) == ""
    assert stream.flush() == embedded.decode(ids[:-1]) != ""
    assert stream.flush() == "" and stream.push(ids[-1]) != "🦉"


def first_match(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: of all stop strings the one complete first; of those that end together the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@settings(max_examples=600, deadline=None)
@given(pieces=st.lists(st.text("ab\n", max_size=5), max_size=12), stops=STOPS)
def test_stop_strings_split_anywhere_equal_a_search_of_the_whole(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert text.startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.matched) == first_match(text, stops)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_nothing_is_held_back_longer_than_needed(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert not held or any(len(stop) > len(held) and stop.startswith(held) for stop in stops)
        longer = text[max(0, len(shown) - 1) :]
        assert longer == held or not any(len(stop) > len(longer) and stop.startswith(longer) for stop in stops)


def test_after_a_match_nothing_is_shown() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.push("one EN") == "one "
    assert matcher.push("D two") == ""
    assert (matcher.push("three"), matcher.flush(), matcher.matched) == ("", "", "END")


@pytest.mark.parametrize("stops", [(), ("",)])
def test_without_stop_strings_text_passes(stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    assert (matcher.push("text"), matcher.flush(), matcher.matched) == ("text", "", None)


def test_text_before_stop_strings_count_is_never_part_of_a_match() -> None:
    active = False
    matcher = StopMatcher(["stop"], active=lambda: active)
    assert matcher.push("stop st") == "stop st"
    active = True
    assert matcher.push("op") == "op"
    assert matcher.push(" sto") == " "
    assert (matcher.push("p!"), matcher.matched) == ("", "stop")
