"""How fast steps are: how many prompt tokens one may compute beside running decodes, so that these keep a share of
their speed, and how long a prompt will take.

Steps are timed by the engine; here is arithmetic alone. Time that a step spends on prompts is taken from a credit that
all steps with decodes pay into. Prompts of much work leave half of the credit to short ones, which may then be computed
at once: over a time longer than it takes to use the credit up, decodes have their share whatever else arrives.
"""

from __future__ import annotations

from collections.abc import Iterable

DECODE_SHARE = 0.57  # of the speed that decodes have alone: half is the promise, and estimates err
QUANTUM = 64  # prompt tokens that are worth a step of their own: fewer cost about as much
_NEWEST = 0.2  # weight of the last step in the averages


class Pace:
    """Owned by the scheduler. `burst_tokens`: prompt tokens that full credit pays for."""

    def __init__(self, burst_tokens: int, decode_share: float = DECODE_SHARE) -> None:
        self._burst_tokens = burst_tokens
        self._share = decode_share
        self._decode_seconds: float | None = None  # of a step with decodes alone
        self._token_seconds: float | None = None  # of a prompt token
        self._credit = 0.0  # seconds
        self._by_depth: dict[int, float] = {}  # of a prompt token, by the binary logarithm of where it was computed

    def observe(self, decodes: int, prompt_tokens: int, seconds: float, depth: int = 0) -> None:
        """A step with so many decodes and prompt tokens, the deepest of them at `depth`, took so long."""
        if decodes and not prompt_tokens:
            self._decode_seconds = _averaged(self._decode_seconds, seconds)
        decode_seconds = self._decodes_of(prompt_tokens, seconds) if decodes else 0.0
        prompt_seconds = max(0.0, seconds - decode_seconds)
        if prompt_tokens >= QUANTUM:
            self._token_seconds = _averaged(self._token_seconds, prompt_seconds / prompt_tokens)
            place = depth.bit_length()
            self._by_depth[place] = _averaged(self._by_depth.get(place), prompt_seconds / prompt_tokens)
        if decodes:
            # What a step of decodes alone takes beyond the others is the machine's doing: no prompt had that time.
            earned = (1 - self._share) * (seconds if prompt_tokens else decode_seconds)
            taken = prompt_seconds if prompt_tokens else 0.0
            self._credit = min(self._full, max(-self._full, self._credit + earned - taken))
        else:
            self._credit = self._full  # nobody was kept waiting

    def observe_decodes(self, seconds: Iterable[float]) -> None:
        """The same for steps of decodes alone, one after the other."""
        decode, credit, full, kept = self._decode_seconds, self._credit, self._full, 1 - self._share
        for took in seconds:
            decode = took if decode is None else decode + _NEWEST * (took - decode)
            credit = min(full, max(-full, credit + kept * (took if took < decode else decode)))
        self._decode_seconds, self._credit = decode, credit

    def prompt_tokens(self, *, long: bool) -> int | None:
        """How many prompt tokens may join decodes in the next step, in prompts of much work or else; None: any number.

        Never for good 0: with full credit at least QUANTUM.
        """
        if self._decode_seconds is None or self._token_seconds is None:
            return None
        kept = self._full / 2 if long else 0.0
        seconds = (self._credit - kept + (1 - self._share) * self._decode_seconds) / self._share
        tokens = int(seconds / self._token_seconds) if self._token_seconds else self._burst_tokens
        if tokens < QUANTUM:
            return QUANTUM if self._credit >= self._full else 0
        return tokens

    def prompt_seconds(self, start: int, end: int) -> float | None:
        """How long the tokens [start, end) of a prompt take with nothing beside them; None while nothing is known.

        Deeper than any prompt so far a token is taken to cost what the deepest did, which is too little.
        """
        if not self._by_depth:
            return None
        total, known = 0.0, sorted(self._by_depth)
        while start < end:
            place = start.bit_length()
            nearest = max((p for p in known if p <= place), default=known[0])
            stop = min(end, 1 << place)
            total += (stop - start) * self._by_depth[nearest]
            start = stop
        return total

    def beside_decodes(self, seconds: float) -> float:
        """How long work on prompts takes while answers are being produced: what credit does not pay takes longer."""
        return max(seconds, (seconds - self._credit) / (1 - self._share))

    @property
    def _full(self) -> float:
        return self._burst_tokens * (self._token_seconds or 0.0)

    def _decodes_of(self, prompt_tokens: int, seconds: float) -> float:
        """The part of a step that its decodes took; estimated until a step of decodes alone was seen."""
        if self._decode_seconds is not None:
            return min(seconds, self._decode_seconds)
        if self._token_seconds is None:
            return seconds
        self._decode_seconds = max(0.1 * seconds, seconds - prompt_tokens * self._token_seconds)
        return self._decode_seconds


def _averaged(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
