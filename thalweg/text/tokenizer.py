"""Tokens and text. Control tokens enter a prompt by id only: text that spells one is ordinary text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from thalweg.errors import ConfigError, nearest

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


class Tokenizer:
    """A tokenizer.json through the `tokenizers` library.

    Encoding releases the interpreter lock, so other threads run on while megabytes of text are tokenised.
    """

    def __init__(self, full: FastTokenizer, plain: FastTokenizer, source: Path) -> None:
        self._full = full
        self._plain = plain
        self._source = source
        self._specials = {t.content: i for i, t in full.get_added_tokens_decoder().items()}
        self._special_ids = frozenset(self._specials.values())
        self.vocab_size: int = full.get_vocab_size(with_added_tokens=True)
        self.bos_id = self.special_id(BOS)
        self.eos_id = self.special_id(EOS)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read DIRECTORY/tokenizer.json. Raises ConfigError naming the file."""
        path = directory / "tokenizer.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            full = FastTokenizer.from_str(json.dumps(fields, ensure_ascii=False))
            # Without its added tokens the same model never recognises a control string in a text.
            plain = FastTokenizer.from_str(json.dumps({**fields, "added_tokens": []}, ensure_ascii=False))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file", param="tokenizer") from None
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise ConfigError(f"{path}: not a tokenizer.json: {error}", param="tokenizer") from error
        return cls(full, plain, path)

    @property
    def specials(self) -> tuple[str, ...]:
        """Every control string of this tokenizer."""
        return tuple(self._specials)

    def special_id(self, text: str) -> int:
        """The id of a control string; ConfigError if this tokenizer has none of that name."""
        if text not in self._specials:
            raise ConfigError(
                f"{self._source}: no control token {text!r}.{nearest(text, self._specials)}", param="tokenizer"
            )
        return self._specials[text]

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text. Control strings in it are spelled out with ordinary tokens."""
        if not text:
            return []
        return list(self._plain.encode_batch([text], add_special_tokens=False)[0].ids)

    def encode_with_controls(self, text: str) -> list[int]:
        """Ids of a text whose control strings are meant: for prompts that their author vouches for."""
        return list(self._full.encode_batch([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of tokens. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._full.decode(list(ids), skip_special_tokens=False) if not skip_special else self._visible(ids))

    def token_text(self, token: int) -> str:
        """The vocabulary's own string of a token, in its byte alphabet where it is not a control string."""
        return str(self._full.id_to_token(token) or "")

    def _visible(self, ids: Iterable[int]) -> str:
        # Only some control tokens carry the library's `special` flag, so its own filter would keep the others.
        return str(self._full.decode([i for i in ids if i not in self._special_ids], skip_special_tokens=False))
