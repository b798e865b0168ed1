"""What to forget first: the expected saved work per byte, aged. Pure scoring code, the same for every tier.

GreedyDual-Size-Frequency: a thing that was used `uses` times, saves `saved_tokens` of compute each time and takes
`size_bytes` is worth uses * saved_tokens / size_bytes, on top of an age clock that rises to the priority of whatever
was evicted last. So a thing that was worth much once is overtaken by those that are used now.
"""

from __future__ import annotations


def priority(age_clock: float, uses: int, saved_tokens: int, size_bytes: int) -> float:
    """The priority to give a thing when it is written or used. The lowest goes first."""
    return age_clock + uses * saved_tokens / max(size_bytes, 1)


def risen(age_clock: float, evicted_priority: float) -> float:
    """The age clock after an eviction. It never falls."""
    return max(age_clock, evicted_priority)
