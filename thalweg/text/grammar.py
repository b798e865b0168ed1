"""Grammars over one tokenizer's ids, by `llguidance`; the only module that knows that library.

A grammar is written in its variant of Lark: rules over text, `<[123]>` for a control token, `%json` for a JSON Schema.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from thalweg.errors import GrammarError
from thalweg.text.tokenizer import Tokenizer

_MOST_CHARACTERS = 500_000  # of a grammar; the library has limits of its own on what becomes of it
_MOST_KEPT = 64
# One space, or a line break and indentation: a model that likes white space cannot go on with it for ever.
_WHITE_SPACE = r" ?|\r?\n[ \t]{0,20}"


class GrammarTextError(Exception):
    """A grammar that cannot be compiled; the message says why."""


class GrammarRun:
    """Where one output stands in a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def can_end(self) -> bool:
        """Whether what came so far is a whole sentence of the grammar."""
        return self._matcher.is_accepting()

    @property
    def over(self) -> bool:
        """Whether no token may follow but the end."""
        return self._matcher.is_stopped()

    def allowed(self) -> bytes:
        """One bit per token id, the lowest bit of the first byte for id 0. Raises GrammarError."""
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def consume(self, token: int) -> None:
        """Go on by one token. Raises GrammarError if the grammar does not allow it."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().split("\n")[0]
            raise GrammarError(f"the output could not be held to its grammar: {reason:.200}")


class Grammar:
    """A compiled grammar, never changed by its runs."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.warnings: tuple[str, ...] = tuple(matcher.get_grammar_warnings())

    def start(self) -> GrammarRun:
        """A run from the beginning; takes some 20 microseconds."""
        return GrammarRun(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one tokenizer, in any thread; keeps the last ones, because agents send theirs again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads the whole vocabulary: a second for 129,280 ids."""
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), tokenizer.vocab_size, tokenizer.eos_id)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()  # guarded by _lock
        self._lock = threading.Lock()

    def compile(self, text: str) -> Grammar:
        """Raises GrammarTextError saying what the library found wrong."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        if len(text) > _MOST_CHARACTERS:
            raise GrammarTextError(
                f"its grammar has {len(text):,} characters; at most {_MOST_CHARACTERS:,} are allowed"
            )
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise GrammarTextError(_reason(matcher.get_error()))
        grammar = Grammar(matcher)
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return grammar


def json_term(schema: Mapping[str, Any] | bool, *, lenient: bool = False) -> str:
    """A JSON value that follows a schema, for the right side of a rule. Overlapping branches of `oneOf` count as
    `anyOf`. `lenient`: keywords that the library does not know are left out of account."""
    options = {"whitespace_pattern": _WHITE_SPACE, "coerce_one_of": True, "lenient": lenient}
    named = {"anyOf": [schema]} if isinstance(schema, bool) else schema
    return f"%json {json.dumps({**named, 'x-guidance': options}, ensure_ascii=False)}"


def text_term(text: str) -> str:
    """Exactly this text, in ordinary tokens."""
    return json.dumps(text, ensure_ascii=False)


def pattern_term(pattern: str) -> str:
    """Text that matches a regular expression, from end to end, in JSON Schema's dialect."""
    return f"/{regex_to_lark(pattern, 'dw')}/"


class _Vocabulary:
    """The tokenizer as the library wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in ids]
        self.special_token_ids = [token for token in ids if tokenizer.is_special(token)]
        self._encode = tokenizer.encode_text

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _reason(error: str) -> str:
    """The library's first line without the place in the grammar, which is not the client's."""
    if error.startswith("panic"):  # an assertion of the library, on the number of symbols for one
        return "its grammar is too large"
    line = error.split("\n")[0] if "regex parse error" not in error else " ".join(error.split("\n")[:4])
    return " ".join(line.split(": ", 1)[-1].split()) if line.startswith("at ") else line
