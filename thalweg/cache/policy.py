"""Which unit boundaries of a sequence get a checkpoint. Pure scoring code: no I/O, no state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """The `boundary` policy: end of prompt, divergence points, encoder hints and every `interval` tokens.

    End of output is added when a request ends, since only then its position is known. `interval` 0 turns that rule off.
    """

    unit_tokens: int
    interval: int

    def boundary(self, position: int) -> int:
        """The last unit boundary at or before a position."""
        return position - position % self.unit_tokens

    def of_prompt(self, prompt_tokens: int, hints: Iterable[int], divergence: int) -> frozenset[int]:
        """Boundaries to keep while a prompt is computed. `divergence` is a boundary, 0 for none.

        The end-of-prompt boundary lies before the last token: the same prompt again must compute at least that one.
        """
        wanted = {self.boundary(prompt_tokens - 1), divergence}
        wanted |= {self.boundary(hint) for hint in hints if 0 < hint <= prompt_tokens}
        return frozenset(wanted - {0})

    def wanted(self, chosen: frozenset[int], start: int, end: int) -> tuple[int, ...]:
        """The boundaries in (start, end] to keep, ascending: the chosen ones and those of the interval rule."""
        inside = {p for p in chosen if start < p <= end}
        if self.interval:
            step = max(self.boundary(self.interval), self.unit_tokens)
            inside |= set(range(start - start % step + step, end + 1, step))
        return tuple(sorted(inside))
