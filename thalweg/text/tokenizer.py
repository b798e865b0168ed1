"""Text to token ids and back, for one checkpoint's `tokenizer.json` (byte-level BPE, as DeepSeek-V4 publishes it)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from thalweg.errors import ConfigError, nearest
from thalweg.text.markers import BOS, EOS

_PIECE = 1 << 16  # characters: some 10 ms of encoding
_LINE_START = re.compile(r"(?<=\n)(?=\S)")
_NEIGHBOURS = (
    "a", "Zed", "7", "123", ".", "!?", "_", "'s", "(", " x", "  ", "\t", "\r", "\n", "é", "ß", "中", "文字", "ア", "한",
    "אב", "🙂", "e\u0301", "\u200b", "$", "\x00", "a b", "x\n\n", "；", "<｜", "1a", "a1", "-1", "\u3000",
)  # fmt: skip


class Tokenizer:
    """Encodes plain text and names control tokens; the two never mix.

    The added vocabulary (control strings) is not in the backend that encodes text, so no text can become a control
    token, whatever it spells (model-spec section 8). Control ids come from `special_id` alone.

    The backend of `tokenizers` keeps Python's lock during `encode`, but gives it up during `encode_batch_fast`, also
    for a batch of one: while 5 MB of source code were encoded (0.6M ids, 1.2 s) a thread that wakes every millisecond
    waited at most 5 ms inside the call and 70 ms while the ids became a list; under `encode` it waited 2.5 s.
    """

    def __init__(self, plain: Backend, added: dict[str, int], bos: str, eos: str) -> None:
        self._plain = plain
        self._added = added
        self._control_text = {token: text for text, token in added.items()}
        self._bytes = _token_bytes(plain.get_vocab(with_added_tokens=False) | added)
        self._check_separation()
        self._cuts_lines = _cuts_lines(plain)
        self.bos_id: int = self.special_id(bos)
        self.eos_id: int = self.special_id(eos)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`, and `tokenizer_config.json` where there is one (its bos_token and eos_token).

        Raises ConfigError naming the file that is missing, unreadable or of another kind than byte-level BPE, or the
        control string that it lacks.
        """
        path = directory / "tokenizer.json"
        description = _read_object(path)
        decoder = description.get("decoder")
        if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
            raise ConfigError(f"{path}: the decoder must be of type ByteLevel", param=str(path))
        try:
            added = {str(token["content"]): int(token["id"]) for token in description.get("added_tokens", [])}
            plain = Backend.from_str(json.dumps({**description, "added_tokens": []}))
        except Exception as error:  # the backend raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer description: {error}", param=str(path)) from error
        plain.no_truncation()
        plain.no_padding()
        bos, eos = _boundary_tokens(directory / "tokenizer_config.json")
        return cls(plain, added, bos, eos)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, control tokens included; 129,280 for the published file."""
        return len(self._bytes)

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The spellings of all control tokens, by ascending id."""
        return tuple(self._control_text[token] for token in sorted(self._control_text))

    def special_id(self, text: str) -> int:
        """The id of one control string, such as `<｜User｜>`. Raises ConfigError naming it where it is missing."""
        try:
            return self._added[text]
        except KeyError:
            hint = nearest(text, self._added)
            raise ConfigError(f"the tokenizer has no control token {text!r}.{hint}", param="tokenizer.json") from None

    def special_text(self, token: int) -> str | None:
        """The control string of an id, or None for an ordinary token."""
        return self._control_text.get(token)

    def is_special(self, token: int) -> bool:
        """Whether an id is a control token."""
        return token in self._control_text

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, without BOS. A control string spelled in it becomes ordinary tokens."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each of several plain texts, encoded in parallel and without holding Python's lock."""
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for own in pieces for piece in own]
        if not flat:
            return [[] for _ in texts]
        encoded = iter(self._plain.encode_batch_fast(flat, add_special_tokens=False))
        return [list(chain.from_iterable(next(encoded).ids for _ in own)) for own in pieces]

    def _pieces(self, text: str) -> list[str]:
        """A long text cut where its words are cut anyway, so that several processors encode it; else the text alone."""
        if len(text) < 2 * _PIECE or not self._cuts_lines:
            return [text]
        pieces, begin = [], 0
        while len(text) - begin >= 2 * _PIECE and (cut := _LINE_START.search(text, begin + _PIECE)) is not None:
            pieces.append(text[begin : cut.start()])
            begin = cut.start()
        return [*pieces, text[begin:]]

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for; empty for an id that the tokenizer does not know."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves every control token out."""
        kept = (token for token in ids if not (skip_special and token in self._control_text))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def _check_separation(self) -> None:
        """No control string may encode to a control id: true of byte-level BPE, checked because safety needs it."""
        texts = list(self._added)
        for text, ids in zip(texts, self.encode_texts(texts), strict=True):
            if not self._control_text.keys().isdisjoint(ids):
                message = f"plain text {text!r} encodes to a control token; the vocabulary must keep them apart"
                raise ConfigError(message, param="tokenizer.json")


def _cuts_lines(plain: Backend) -> bool:
    """Whether this tokenizer's words always end with a newline that something visible follows: then encoding the text
    before and behind gives the same ids. Tried with all kinds of neighbours."""
    cut, normal = plain.pre_tokenizer, plain.normalizer
    if cut is None or (normal is not None and any(normal.normalize_str(text) != text for text in _NEIGHBOURS)):
        return False
    for before, after in product(_NEIGHBOURS, repeat=2):
        words = cut.pre_tokenize_str(f"{before}\n{after}")
        if all(span[0] != len(before) + 1 for _, span in words) and not after[0].isspace():
            return False
    return True


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param=str(path)) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", param=str(path)) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object", param=str(path))
    return value


def _boundary_tokens(path: Path) -> tuple[str, str]:
    """The spellings of BOS and EOS; V4's own where the file or the field is missing."""
    settings = _read_object(path) if path.exists() else {}
    found = []
    for key, default in (("bos_token", BOS), ("eos_token", EOS)):
        value = settings.get(key) or default
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ConfigError(f"{path}: {key} must be a string or an object with a string `content`", param=str(path))
        found.append(text)
    return found[0], found[1]


def _token_bytes(vocabulary: dict[str, int]) -> list[bytes]:
    """Bytes of every id, indexed by id. Byte-level vocabularies spell each byte as one printable character."""
    alphabet = _byte_alphabet()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, token in vocabulary.items():
        try:
            table[token] = bytes([alphabet[character] for character in text])
        except KeyError:  # a control string with characters outside the alphabet stands for itself
            table[token] = text.encode("utf-8")
    return table


def _byte_alphabet() -> dict[str, int]:
    """The printable character of each byte: itself where printable, else the next free code point from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
