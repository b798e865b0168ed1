"""Which replica gets a request. Each router sees the replicas as they are when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

AFFINITY_SLACK = 2.0  # a replica with the prefix is passed over if it has more than so many times the least work
AFFINITY_TOKENS = 8192  # or so many tokens more, whatever the least is


class Routing(StrEnum):
    ROUND_ROBIN = "round-robin"
    LEAST_LOADED = "least-loaded"
    STICKY = "sticky"  # a session stays where its first request went, which was the least loaded
    PREFIX = "prefix"  # where most of the prompt is cached, unless that replica has far more to do


class Place(Protocol):
    """What a router may know of a replica."""

    @property
    def outstanding_tokens(self) -> int:
        """Tokens of its open requests that are not computed yet, prompts and outputs."""
        ...


class Router:
    """Chooses by one of the rules. Ties go to the first replica."""

    def __init__(self, routing: Routing, places: Sequence[Place]) -> None:
        self._routing, self._places = routing, places
        self._next = 0
        self._sticky: dict[str, int] = {}

    def choose(self, session_name: str, cached_tokens: Callable[[int], int]) -> int:
        """The number of a replica. `cached_tokens` says of each how much of the prompt is on its device."""
        if len(self._places) == 1:
            return 0
        if self._routing is Routing.ROUND_ROBIN:
            self._next += 1
            return (self._next - 1) % len(self._places)
        if self._routing is Routing.STICKY:
            return self._sticky.setdefault(session_name, self._least_loaded())
        return self._least_loaded() if self._routing is Routing.LEAST_LOADED else self._with_prefix(cached_tokens)

    def forget(self, session_name: str) -> None:
        """A session is over."""
        self._sticky.pop(session_name, None)

    def _least_loaded(self) -> int:
        return min(range(len(self._places)), key=lambda i: self._places[i].outstanding_tokens)

    def _with_prefix(self, cached_tokens: Callable[[int], int]) -> int:
        loads = [place.outstanding_tokens for place in self._places]
        most = max(AFFINITY_SLACK * min(loads), min(loads) + AFFINITY_TOKENS)
        allowed = [i for i, load in enumerate(loads) if load <= most]
        return max(allowed, key=lambda i: (cached_tokens(i), -loads[i], -i))
