"""Prompts of about so many tokens, without the endpoint's tokenizer: real text behind a beginning of its own.

Lengths are aimed at in characters; how many tokens a prompt really has, the endpoint says. A salt at the front makes a
prompt that no cache has seen; the text behind it is another stretch of real text for every purpose.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from functools import cached_property

from thalweg.prose.facts import FIRST_WORDS, WORDS, needle_line, question_for
from thalweg.prose.library import library_texts

_SALT_WORDS = 10  # of about a hundred each
_FIRST_GUESS = 3.6  # characters per token


class Prompts:
    """Makes texts. What they say depends on `seed` and the key alone; their salts on the process as well, so that a
    probe that is repeated after a crash is not served from what its first try left in the cache."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._process = secrets.token_hex(8)
        self.characters_per_token = _FIRST_GUESS

    @cached_property
    def _text(self) -> str:
        texts = [text for text in library_texts() if text.strip()]
        random.Random(self._seed).shuffle(texts)
        return "\n".join(texts)

    def random(self, key: str) -> random.Random:
        """A generator of its own for each key."""
        return random.Random(f"{self._seed}/{key}")

    def characters(self, tokens: float) -> int:
        return max(1, round(tokens * self.characters_per_token))

    def salt(self, key: str) -> str:
        """A line that no other prompt begins with: words that are one token each in most vocabularies."""
        digest = hashlib.sha256(f"{self._process}/{key}".encode()).digest()
        return "".join(f" {WORDS[byte % len(WORDS)]}" for byte in digest[:_SALT_WORDS]) + "\n"

    def stretch(self, key: str, characters: int) -> str:
        """So much running text, from a line on that the key decides."""
        text = self._text
        begin = text.find("\n", self.random(key).randrange(len(text))) + 1
        while len(text) - begin < characters:
            text += self._text
        return text[begin : begin + characters]

    def cold(self, key: str, characters: int, *, body: str | None = None) -> str:
        """So many characters that nobody has sent. `body`: the key of the text behind the salt."""
        salt = self.salt(key)
        return salt + self.stretch(body or key, max(0, characters - len(salt)))

    def needle(self, key: str, characters: int, padding: int, salt: str) -> tuple[str, str]:
        """A document with one fact in it and the question for it, and the answer. `padding`: words at its end."""
        chosen = self.random(key)
        first, second = chosen.sample(WORDS, 2)
        name, value = f"{first} {second}", f"{chosen.choice(FIRST_WORDS)} {chosen.choice(WORDS)}"
        lines = self.stretch(key, characters).split("\n")
        lines.insert(chosen.randrange(len(lines)), needle_line(name, value).rstrip())
        padded = "\n".join(lines) + " data" * padding
        return f"{self.salt(salt)}{padded}\n\n{question_for(name)}", value
