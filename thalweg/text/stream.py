"""From a stream of tokens to a stream of text, and stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from thalweg.text.tokenizer import Tokenizer

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def _byte_alphabet() -> dict[str, int]:
    """The byte-level BPE alphabet: printable bytes stand for themselves, the rest for characters from U+0100 on."""
    table = {byte: chr(byte) for byte in _PRINTABLE}
    spare = 0x100
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(spare)
            spare += 1
    return {character: byte for byte, character in table.items()}


class TokenStream:
    """Text of tokens as they come, never with a broken character: bytes of an unfinished one are held back.

    Works on the tokens' own bytes, so that each token costs its own length however long the output is. The pieces
    joined are what decoding all tokens at once gives.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet()
        self._held = b""

    def push(self, token: int) -> str:
        """The text that this token completes."""
        if self._tokenizer.is_special(token):
            return self.flush() + self._tokenizer.token_text(token)
        text = self._tokenizer.token_text(token)
        self._held += bytes(self._alphabet[character] for character in text)
        complete = len(self._held) - _unfinished(self._held)
        ready, self._held = self._held[:complete], self._held[complete:]
        return ready.decode("utf-8", errors="replace")

    def flush(self) -> str:
        """What is held back, as replacement characters: no more tokens will complete it."""
        held, self._held = self._held, b""
        return held.decode("utf-8", errors="replace")


def _unfinished(data: bytes) -> int:
    """Length of an incomplete UTF-8 character at the end that more bytes could complete."""
    for length in range(1, min(3, len(data)) + 1):
        byte = data[-length]
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < size and _possible(data[-length:]) else 0
        if byte < 0x80:
            return 0
    return 0


def _possible(start: bytes) -> bool:
    """True if some continuation makes these bytes one valid character."""
    fillers = (0x80, 0xBF, 0x90)
    size = 2 if start[0] < 0xE0 else 3 if start[0] < 0xF0 else 4
    candidates = [start + bytes([f] * (size - len(start))) for f in fillers]
    return any(_valid(c) for c in candidates)


def _valid(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def held_back(text: str, markers: Iterable[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a marker and may still become one."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


class StopMatcher:
    """Holds back text that could begin a stop string; cuts the text before the first one that appears.

    `active` says whether stop strings count yet (min_tokens): text passed while it is False is never matched.
    """

    def __init__(self, stops: tuple[str, ...], active: Callable[[], bool] = lambda: True) -> None:
        self._stops = stops
        self._active = active
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show. After a match nothing more is shown."""
        if self.matched is not None:
            return ""
        if not self._stops or not self._active():
            shown, self._held = self._held + text, ""
            return shown
        pending = self._held + text
        found = [(pending.find(stop), -len(stop), stop) for stop in self._stops if stop in pending]
        if found:
            place, _, self.matched = min(found)
            self._held = ""
            return pending[:place]
        keep = held_back(pending, self._stops)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held
