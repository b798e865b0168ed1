"""What the server remembers of requests and speed, for the live page. All of it is bounded, and by tenant."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from thalweg.engine.status import EngineStatus
from thalweg.metrics.finished import FinishedRequest
from thalweg.server.record import RequestRecord

MOST_FINISHED = 60  # of one tenant
SAMPLES = 300
SAMPLE_SECONDS = 1.0


@dataclass(slots=True)
class Ledger:
    """Requests of one tenant. There are no more tenants than API keys, and no more open requests than --max-waiting."""

    open: dict[str, RequestRecord] = field(default_factory=dict)  # by request id, in order of arrival
    finished: deque[FinishedRequest] = field(default_factory=lambda: deque(maxlen=MOST_FINISHED))
    reasons: Counter[str] = field(default_factory=Counter)  # requests by why no more was cached
    sources: Counter[str] = field(default_factory=Counter)  # prompt tokens by where they came from
    ended: Counter[str] = field(default_factory=Counter)  # requests by how they ended


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens computed since start-up, when the engine's clock showed `seconds`."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int


class History:
    """Owned by the event loop."""

    def __init__(self) -> None:
        self._ledgers: dict[str, Ledger] = {}
        self.samples: deque[Sample] = deque(maxlen=SAMPLES + 1)

    def ledger(self, tenant: str) -> Ledger:
        return self._ledgers.setdefault(tenant, Ledger())

    def begun(self, record: RequestRecord) -> None:
        self.ledger(record.caller.tenant).open[record.request_id] = record

    def ended(self, record: RequestRecord, finished: FinishedRequest) -> None:
        ledger = self.ledger(record.caller.tenant)
        ledger.open.pop(record.request_id, None)
        ledger.finished.append(finished)
        ledger.ended[finished.reason] += 1
        ledger.sources.update(finished.prompt_sources)
        if finished.miss_reason is not None:
            ledger.reasons[finished.miss_reason] += 1

    def sample(self, status: EngineStatus, now: float) -> None:
        """Note how much was computed until `now`."""
        counters = status.counters
        decode = int(counters.get("decode_tokens", 0))
        self.samples.append(Sample(now, int(counters.get("step_tokens", 0)) - decode, decode))

    async def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Sample for ever. Reads the snapshot that the engine takes anyway."""
        clock = asyncio.get_running_loop().time
        while True:
            self.sample(status(), clock())
            await asyncio.sleep(SAMPLE_SECONDS)
