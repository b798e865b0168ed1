"""The text to train on: this Python's standard library as token ids, file after file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from thalweg.evaluation.haystack import Text, text_of
from thalweg.prose.library import library_texts
from thalweg.text.tokenizer import Tokenizer

HELD_OUT = 0.05  # the last part of the text is never trained on


def read_text(tokenizer: Tokenizer, store: Path | None = None, most_files: int | None = None) -> Text:
    """The library's files, joined, without the part that is held out. `store` keeps the ids between runs."""
    if store is not None and store.exists():
        ids = np.load(store)
    else:
        texts = list(islice(library_texts(), most_files))
        ids = np.concatenate([np.array(i, np.int64) for i in tokenizer.encode_texts(texts)])
        if store is not None:
            np.save(store, ids)
    return text_of(tokenizer, ids).between(0, int(len(ids) * (1 - HELD_OUT)))
