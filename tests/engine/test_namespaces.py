"""No two of (model, tenant, salt) have one namespace, however their texts are cut."""

from __future__ import annotations

from itertools import product

import numpy as np

from thalweg.engine.runtime import namespace_of
from thalweg.types import GenerateRequest


def namespace(about: str, tenant: str, salt: str) -> bytes:
    return namespace_of(
        about.encode(), GenerateRequest("x", np.array([1], np.int32), tenant=tenant, cache_salt=salt)
    ).own


def test_every_triple_has_its_own() -> None:
    texts = ("", "a", "b", "ab", "ba", "a\0", "\0a", "\0", "a\0b", "\x00\x00\x00\x00\x00\x00\x00\x01a")
    triples = list(product(texts, repeat=3))
    assert len({namespace(*triple) for triple in triples}) == len(triples)


def test_what_explains_misses_is_of_one_tenant() -> None:
    """Even a reason must not tell that another tenant has the same tokens."""
    requests = [
        GenerateRequest("x", np.array([1], np.int32), tenant=tenant, cache_salt=salt)
        for tenant, salt in product(("", "a", "b", "ab"), repeat=2)
    ]
    spaces = [namespace_of(b"model", request) for request in requests]
    assert len({space.content for space in spaces}) == 16 and len({space.tenant for space in spaces}) == 4
    assert [s.content for s in spaces] == [namespace_of(b"another", request).content for request in requests]


def test_it_is_the_same_after_a_restart() -> None:
    assert namespace("model", "tenant", "salt").hex() == "59ba41297c8268502153911082446260"
