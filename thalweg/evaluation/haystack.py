"""Documents of exactly so many tokens: running text with lines put in at given token positions.

Everything happens in token ids. Lines go in only where the tokenizer cuts anyway, at the start of a line, so that the
decoded document encodes to the same ids again; `Haystack.build` checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thalweg.errors import ConfigError
from thalweg.prose.library import library_texts
from thalweg.text.tokenizer import Tokenizer

ENTRY = 4  # tokens per CSA entry
_FILES = 16  # encoded at once
_LEAST_GAP = 2 * ENTRY  # tokens of text that let a line have any alignment
_SEARCH_TOKENS = 256  # how far a line may move to a natural line start with its alignment


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids [T] int64, and the ascending indices where a line may be put in."""

    ids: np.ndarray
    line_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def between(self, begin: int, end: int) -> Text:
        starts = self.line_starts[np.searchsorted(self.line_starts, begin) : np.searchsorted(self.line_starts, end)]
        return Text(self.ids[begin:end], starts - begin)


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> Text:
    """`ids` with the line starts that are safe: the token before ends a line, and no blank line surrounds it."""
    spelled = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    ends = np.array([s.endswith(b"\n") for s in spelled])
    breaks = np.array([s.strip(b" \t") == b"" or s[:1] in (b"\n", b"\r") for s in spelled])
    # A token of mere spaces may belong to a blank line, which the tokenizer joins with the line end before it.
    blank = breaks[ids] & np.append(ends[ids[1:]] & breaks[ids[1:]], False)
    starts = np.flatnonzero(ends[ids[:-1]] & ~blank[1:] & ~np.isin(ids[1:], np.flatnonzero(ends & breaks))) + 1
    return Text(ids, starts)


def library_text(tokenizer: Tokenizer, least_tokens: int, seed: int) -> Text:
    """Source files of this Python's standard library, from a random one on: so many tokens, or all there are."""
    texts = [text.strip("\r\n") + "\n" for text in library_texts() if text.strip()]
    first = int(np.random.default_rng(seed).integers(len(texts)))
    texts = texts[first:] + texts[:first]
    encoded: list[np.ndarray] = []
    total = 0
    for begin in range(0, len(texts), _FILES):
        if total >= least_tokens:
            break
        encoded += [np.array(ids, np.int64) for ids in tokenizer.encode_texts(texts[begin : begin + _FILES])]
        total = sum(map(len, encoded))
    return text_of(tokenizer, np.concatenate(encoded))


@dataclass(frozen=True, slots=True)
class Line:
    """What to put in, and where: `at` is the prompt position of its first token.

    Without `exact` it goes to a natural line start soon after `at` with the same remainder modulo 4, if there is one.
    """

    text: str
    at: int
    exact: bool = False


class Haystack:
    """Builds documents that begin at prompt position `head_tokens`."""

    def __init__(self, tokenizer: Tokenizer, text: Text, head_tokens: int) -> None:
        self._tokenizer, self._text, self._head = tokenizer, text, head_tokens
        pad = [tokenizer.encode_text(part) for part in ("data", " data", "\n")]
        if any(len(part) != 1 for part in pad):
            raise ConfigError("the tokenizer has no single tokens for `data` and a line end", param="tokenizer")
        self._first, self._more, self._end = (part[0] for part in pad)

    def build(self, random: np.random.Generator, tokens: int, lines: Sequence[Line]) -> tuple[str, list[int]]:
        """A document of exactly `tokens` tokens, and the prompt position of each line.

        Raises ConfigError where the lines do not fit, or where the tokenizer cuts text in another way than assumed.
        """
        encoded = self._tokenizer.encode_texts([line.text for line in lines])
        filler = self._filler(random, tokens - sum(map(len, encoded)))
        ids: list[int] = []
        places = [0] * len(lines)
        done = 0
        spare = tokens - 1 - sum(map(len, encoded))  # text that can go before lines; a token stays for the end
        for left, which in reversed(list(enumerate(sorted(range(len(lines)), key=lambda i: -lines[i].at)))):
            line = lines[which]
            most = spare if line.exact else max(0, spare - _LEAST_GAP * left)  # so that later lines find their place
            gap = _gap(line.at - self._head - len(ids), most, exact=line.exact)
            upto, pad = _place(filler.line_starts, done, (gap, most), exact=line.exact)
            spare -= upto - done + pad
            ids += filler.ids[done:upto].tolist() + self._pad(pad, ends=True)
            places[which] = self._head + len(ids)
            ids += encoded[which]
            done = upto
        ids += self._tail(filler, done, tokens - len(ids))
        document = self._tokenizer.decode(ids)
        if len(ids) != tokens or self._tokenizer.encode_text(document) != ids:
            raise ConfigError("this tokenizer gives no document of exact length", param="tokenizer")
        return document, places

    def _filler(self, random: np.random.Generator, count: int) -> Text:
        """A stretch of text that begins at a line start and is longer than needed."""
        if count < 0:
            raise ConfigError(f"the lines need {-count} tokens more than the context has", param="context")
        last = int(np.searchsorted(self._text.line_starts, len(self._text) - count - _SEARCH_TOKENS))
        if last == 0:
            most = len(self._text) - _SEARCH_TOKENS
            raise ConfigError(
                f"there are {most:,} tokens of text on this machine, {count:,} are needed", param="context"
            )
        begin = int(self._text.line_starts[random.integers(0, last)])
        return self._text.between(begin, begin + count + _SEARCH_TOKENS)

    def _pad(self, count: int, *, ends: bool) -> list[int]:
        """A line of `count` tokens, or of none."""
        if count == 0:
            return []
        words = count - ends
        return [self._first, *[self._more] * (words - 1)][:words] + [self._end] * ends

    def _tail(self, filler: Text, done: int, count: int) -> list[int]:
        """The last `count` tokens: whole lines, then words up to the last token, so that a blank line can follow."""
        fitting = filler.line_starts[(filler.line_starts >= done) & (filler.line_starts < done + count)]
        upto = int(fitting[-1]) if len(fitting) else done
        return [*filler.ids[done:upto].tolist(), *self._pad(count - (upto - done), ends=False)]


def _gap(wanted: int, most: int, *, exact: bool) -> int:
    """Tokens to put before a line: `wanted`, or the nearest possible with the same remainder modulo ENTRY."""
    if exact:
        return min(max(0, wanted), most)
    gap = wanted if wanted >= 0 else wanted % ENTRY  # an earlier line went further than it should
    if gap == 1:  # a line of one token would be blank
        gap += ENTRY
    return gap if gap <= most else max(0, most - (most - gap) % ENTRY)


def _place(starts: np.ndarray, done: int, gaps: tuple[int, int], *, exact: bool) -> tuple[int, int]:
    """How far to go on in the text before a line, and the tokens of padding after that.

    `gaps`: the wanted tokens before the line, and the most.
    """
    gap, most = gaps
    if not exact:
        end = done + min(gap + _SEARCH_TOKENS, most + 1)
        near = starts[np.searchsorted(starts, done + gap) : np.searchsorted(starts, end)]
        fitting = near[(near - done - gap) % ENTRY == 0]
        if len(fitting):
            return int(fitting[0]), 0
    later = starts[np.searchsorted(starts, done, "right") : np.searchsorted(starts, done + gap, "right")]
    for upto in (*later[::-1].tolist(), done):
        if done + gap - upto != 1:  # a line of one token would be blank
            return upto, done + gap - upto
    return done, 0
