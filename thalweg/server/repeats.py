"""Notices prompts that repeat and are never served from the cache, and says so once in the log."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from thalweg.types import CacheReport, MissReason, TokenArray

_KEPT = 1024  # first units remembered
_MOST_MISSES = 20  # repeated prompts without a hit before the warning
_log = logging.getLogger("thalweg.server")


class RepeatWatch:
    """The prompts of one tenant, by their first unit: the least that can be reused."""

    def __init__(self, tenant_name: str, unit_tokens: int) -> None:
        self._tenant_name = tenant_name
        self._unit_tokens = unit_tokens
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._misses: Counter[MissReason] = Counter()
        self._warned = False

    def begin(self, prompt: TokenArray) -> Callable[[CacheReport], None]:
        """A request begins: what to call when it has been served. It repeats one that had been served by now."""
        if len(prompt) <= self._unit_tokens:
            return lambda _: None
        first_unit = blake2b(prompt[: self._unit_tokens].tobytes(), digest_size=16).digest()
        repeated = first_unit in self._known
        return lambda report: self._served(first_unit, repeated, report)

    def _served(self, first_unit: bytes, repeated: bool, report: CacheReport) -> None:
        if report.reason is MissReason.DISABLED:
            return
        self._known[first_unit] = None
        self._known.move_to_end(first_unit)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        if report.cached_tokens + report.replayed_tokens > 0:
            self._misses.clear()
            self._warned = False
        elif repeated:
            self._misses[report.reason] += 1
            self._warn()

    def _warn(self) -> None:
        count = self._misses.total()
        if count < _MOST_MISSES or self._warned:
            return
        self._warned = True
        whose = f" of {self._tenant_name!r}" if self._tenant_name else ""
        reasons = ", ".join(f"{reason.value} {times}" for reason, times in self._misses.most_common())
        _log.warning("%d prompts%s began like earlier ones and none hit the prefix cache: %s", count, whose, reasons)
