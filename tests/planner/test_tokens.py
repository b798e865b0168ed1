"""Keys of synthetic tokens are equal exactly where real tokens of the same pieces are."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.engine_run import tokens_of
from thalweg.cache.keys import TokenKeys
from thalweg.cache.prefix_index import Namespace, PrefixIndex
from thalweg.planner.tokens import SyntheticKeys, SyntheticTokens, placeholder

PIECES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), min_size=1, max_size=5).map(tuple)
EIGHT = 8


@settings(max_examples=80, deadline=None)
@given(PIECES, PIECES, st.integers(0, 300))
def test_equal_keys_mean_equal_tokens(one, other, outputs: int) -> None:
    keys, real = SyntheticKeys(), TokenKeys(EIGHT)
    sides = []
    for pieces in (one, other):
        synthetic = SyntheticTokens(pieces, output=4, unit_tokens=EIGHT)
        for _ in range(outputs):
            synthetic.append(0)
        tokens = tokens_of((*pieces, (4, outputs))) if outputs else tokens_of(pieces)
        assert len(synthetic) == len(tokens)
        units = len(tokens) // EIGHT
        assert list(keys.first_keys(synthetic, units)) == [keys.key(synthetic, unit) for unit in range(units)]
        sides.append([(keys.key(synthetic, unit), real.key(tokens, unit)) for unit in range(units)])
    for (key, text), (other_key, other_text) in zip(*sides, strict=False):
        if key == other_key:
            assert text == other_text
        elif one[0][0] != other[0][0] or len(one) == len(other) == 1:
            assert text != other_text


def test_a_prompt_that_grows_has_the_keys_of_the_next_turn() -> None:
    """A turn's output is found by the turn after it, whatever was asked of the keys before it was complete."""
    asked = SyntheticTokens(((0, 300),), output=1)
    keys = SyntheticKeys()
    keys.key(asked, 1)
    for _ in range(500):
        asked.append(0)
    following = SyntheticTokens(((0, 300), (1, 500), (2, 50)), output=3)
    assert list(keys.first_keys(asked, 6)) == list(keys.first_keys(following, 6))


def test_a_placeholder_takes_no_memory() -> None:
    prompt = placeholder(10**9)
    assert len(prompt) == 10**9 and prompt.strides == (0,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=30), st.data())
def test_the_longest_common_beginning_is_found_among_many_children(known, data: st.DataObject) -> None:
    index, namespace = PrefixIndex(4), Namespace(b"n")
    for tokens in known:
        root = index.root(namespace)
        if index.child(root, np.array(tokens, np.int32)) is None:
            index.insert(root, np.array(tokens, np.int32), {})
    gone = data.draw(st.integers(0, max(0, index.nodes - 1)))
    for _ in range(gone):
        index.evict_unit(lambda node: True)
    left = [np.frombuffer(node.key, np.int32) for node in index.units()]
    asked = np.array([*data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)), 7, 7, 7, 7], np.int32)[:5]
    match = index.match(namespace, asked, 1)
    if not match.path:
        common = [int(np.argmin([*(a == b for a, b in zip(one, asked, strict=False)), False])) for one in left]
        assert index.common_tokens(namespace, match, asked) == max(common, default=0)
