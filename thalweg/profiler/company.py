"""What requests do to each other: a running answer and short prompts beside a long one, and who goes first."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from statistics import median

from thalweg.profiler.client import Reading
from thalweg.profiler.profile import Interference, Queueing
from thalweg.profiler.session import Probe, Session
from thalweg.profiler.store import Record

_TURNS = 3
_RUNNING_TOKENS = 256  # prompt of the answer that runs beside
_ALONE_SECONDS = 1.0
_SHORTS_ALONE, _SHORTS_BESIDE = 3, 10
_PAUSES = 3  # between short prompts, as often as one takes alone: they must not be all that is computed
_PAUSE_SECONDS = 0.05
_MOST_OUTPUT = 32_768


async def measure_company(session: Session) -> None:
    tokens = session.plan.company_tokens
    for turn in range(_TURNS):
        await session.measure(f"company#{turn}", 2 * tokens, _beside(session, f"company#{turn}"))
        await session.measure(f"queue#{turn}", 2 * tokens, _queued(session, f"queue#{turn}"))


def _short_tokens(session: Session) -> int:
    return session.plan.contexts[0]


def _cold(session: Session, key: str, tokens: int) -> str:
    return session.prompts.cold(key, session.prompts.characters(tokens))


def _beside(session: Session, key: str) -> Probe:
    """The long prompt alone, then a running answer and short prompts, first alone and then beside another long one."""

    async def probe() -> Record:
        long, short = session.plan.company_tokens, _short_tokens(session)
        alone = await session.ask(_cold(session, f"{key}/alone", long))
        shorts = [await session.ask(_cold(session, f"{key}/short/{i}", short)) for i in range(_SHORTS_ALONE)]
        running = Reading()
        answering = asyncio.create_task(
            session.client.read(session.form, _cold(session, f"{key}/runs", _RUNNING_TOKENS), _output(session), running)
        )
        try:
            while not running.times and not answering.done():
                await asyncio.sleep(0.01)
            await asyncio.sleep(_ALONE_SECONDS)
            sent = time.perf_counter()
            reading = asyncio.create_task(session.ask(_cold(session, f"{key}/long", long)))
            beside: list[float] = []
            pause = _PAUSES * median(a.first_token_seconds for a in shorts)
            while not reading.done() and len(beside) < _SHORTS_BESIDE:
                answer = await session.ask(_cold(session, f"{key}/beside/{len(beside)}", short))
                beside += [] if reading.done() else [answer.first_token_seconds]
                await asyncio.sleep(pause)
            company = await reading
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering
        return {
            "long_tokens": session.tokens_of("", company) or long,
            "tpot_alone": _token_seconds(running.times, running.times[0], sent),
            "tpot_beside": _token_seconds(running.times, sent, company.times[0]),
            "short_ttft_alone": [a.first_token_seconds for a in shorts],
            "short_ttft_beside": beside,
            "long_ttft_alone": alone.first_token_seconds,
            "long_ttft_beside": company.first_token_seconds,
        }

    return probe


def _output(session: Session) -> int:
    """Tokens of an answer that outlasts the long prompt, within what the model allows."""
    longest = session.facts.max_model_len or _MOST_OUTPUT
    return max(16, min(_MOST_OUTPUT, longest - 2 * _RUNNING_TOKENS))


def _token_seconds(times: list[float], begin: float, end: float) -> float | None:
    """Seconds per chunk within a span; None where the answer gave too little in it."""
    within = [t for t in times if begin < t <= end]
    return None if len(within) < 2 else (end - begin) / len(within)


def _queued(session: Session, key: str) -> Probe:
    """Two long prompts and then a short one: when each has its first token."""

    async def probe() -> Record:
        long, short = session.plan.company_tokens, _short_tokens(session)
        tasks = []
        for name, tokens in (("one", long), ("two", long), ("short", short)):
            tasks.append(asyncio.create_task(session.ask(_cold(session, f"{key}/{name}", tokens))))
            await asyncio.sleep(_PAUSE_SECONDS)
        answers = await asyncio.gather(*tasks)
        begin = answers[0].sent
        return {"seconds": [a.times[0] - begin for a in answers]}

    return probe


def interference(session: Session) -> Interference | None:
    found = list(session.records("company#").values())
    if not found:
        return None
    joined = {
        name: tuple(value for r in found for value in (r[name] if isinstance(r[name], list) else [r[name]]) if value)
        for name in Interference.__dataclass_fields__
        if name not in ("long_tokens", "short_tokens")
    }
    return Interference(found[0]["long_tokens"], _short_tokens(session), **joined)


def queueing(session: Session) -> Queueing | None:
    """Short first: the short one's first token comes before that of the long one sent before it."""
    found = [tuple(r["seconds"]) for r in session.records("queue#").values()]
    if not found:
        return None
    one, two, short = (median(column) for column in zip(*found, strict=True))
    first, second = sorted((one, two))
    discipline = "short-first" if short < first else "first-come" if short >= second else "next-in-line"
    # One after the other, the second takes twice as long as the first.
    side_by_side = second < 1.5 * first
    return Queueing(discipline, "side-by-side" if side_by_side else "one-by-one", tuple(found))
