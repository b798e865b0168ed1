"""Many requests at once: closed loops of c clients, and open ones that arrive at random times whatever happens.

Each request is a document that was sent before and a question of its own behind it, as agents' turns are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from thalweg.errors import ThalwegError
from thalweg.profiler.client import Answer
from thalweg.profiler.profile import Load, Objectives
from thalweg.profiler.session import Session
from thalweg.profiler.store import Record

_DOCUMENTS = 4


async def measure_load(session: Session) -> None:
    plan = session.plan
    best = 0.0
    seconds = plan.load_seconds
    tokens = _DOCUMENTS * plan.load_context
    for concurrency in plan.concurrencies:
        if session.left_seconds() < 2 * seconds:
            session.left_out[f"load/closed/{concurrency}"] = "time"
            continue
        probe = _Loading(session, f"load/closed/{concurrency}", concurrency, None).run
        record = await session.measure(f"load/closed/{concurrency}", tokens, probe)
        if record is not None:
            best = max(best, len(record["ttft_seconds"]) / record["seconds"])
    for share in plan.rates if best else ():
        if session.left_seconds() < 2 * seconds:
            session.left_out[f"load/open/{share:g}"] = "time"
            continue
        probe = _Loading(session, f"load/open/{share:g}", None, share * best).run
        await session.measure(f"load/open/{share:g}", tokens, probe)


class _Loading:
    """One level of load."""

    def __init__(self, session: Session, key: str, concurrency: int | None, rate: float | None) -> None:
        self._session, self._key, self._concurrency, self._rate = session, key, concurrency, rate
        plan = session.plan
        prompts = session.prompts
        shared = round(prompts.characters(plan.load_context) * plan.load_reuse)
        self._rest = prompts.characters(plan.load_context) - shared
        self._documents = [prompts.cold(f"{key}/document/{i}", shared) for i in range(_DOCUMENTS)]
        self._random = prompts.random(key)
        self._answers: list[tuple[str, Answer]] = []
        self._failed = 0
        self._number = 0

    async def run(self) -> Record:
        session = self._session
        for document in self._documents:
            await session.ask(document)
        begin = time.perf_counter()
        end = begin + session.plan.load_seconds
        if self._concurrency is not None:
            await asyncio.gather(*(self._client(end) for _ in range(self._concurrency)))
        else:
            await self._arrivals(end)
        seconds = time.perf_counter() - begin
        answers = [answer for _, answer in self._answers]
        tokens = sorted(session.tokens_of(text, answer) for text, answer in self._answers)
        return {
            "concurrency": self._concurrency,
            "rate": self._rate,
            "context_tokens": tokens[len(tokens) // 2] if tokens else session.plan.load_context,
            "seconds": seconds,
            "ttft_seconds": [a.first_token_seconds for a in answers],
            "tpot_seconds": [a.token_seconds or 0.0 for a in answers],
            "failed": self._failed,
        }

    async def _client(self, end: float) -> None:
        while time.perf_counter() < end:
            await self._one()

    async def _arrivals(self, end: float) -> None:
        """Exponential gaps; everything that arrived is waited for."""
        tasks = [asyncio.create_task(self._one()) async for _ in self._clock(end)]
        await asyncio.gather(*tasks)

    async def _clock(self, end: float) -> AsyncIterator[None]:
        assert self._rate is not None, "open loops have a rate"
        due = time.perf_counter() + self._random.expovariate(self._rate)
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            yield
            due += self._random.expovariate(self._rate)

    async def _one(self) -> None:
        number = self._number
        self._number += 1
        document = self._documents[self._random.randrange(_DOCUMENTS)]
        text = document + self._session.prompts.cold(f"{self._key}/{number}", self._rest)
        try:
            self._answers.append((text, await self._session.ask(text, self._session.plan.load_output)))
        except ThalwegError:
            self._failed += 1


def loads(session: Session, objectives: Objectives) -> tuple[Load, ...]:
    plan = session.plan
    found = []
    for record in session.records("load/").values():
        both = list(zip(record["ttft_seconds"], record["tpot_seconds"], strict=True))
        attained = sum(t <= objectives.ttft_seconds and p <= objectives.tpot_seconds for t, p in both)
        found.append(
            Load(
                "open" if record["rate"] else "closed",
                record["concurrency"],
                record["rate"],
                record["context_tokens"],
                plan.load_reuse,
                plan.load_output,
                record["seconds"],
                tuple(record["ttft_seconds"]),
                tuple(record["tpot_seconds"]),
                attained,
                record["failed"],
            )
        )
    return tuple(found)
