"""The prefix cache from outside: in which steps it serves, what it forgets, and how much it keeps.

Where answers report cached tokens these are taken; else what the counter of /metrics rose by; else a hit is told from a
miss by the time to the first token.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from scipy.optimize import nnls

from thalweg.profiler.client import Answer
from thalweg.profiler.counters import hit_tokens
from thalweg.profiler.profile import CacheFacts, Fill, Retained
from thalweg.profiler.session import Probe, Session
from thalweg.profiler.store import Record
from thalweg.profiler.surface import Estimate, Tag

_FORKS = 12
_COUNTER_SECONDS = 0.03  # after an answer, until counters have it
_TELLING = 4  # different counts of served tokens that tell what they are multiples of
_FIRST_CHECK = 8  # prompts before the first one is asked for again
_CHECK_STEP = 1.3
_END = 3  # so many in a row that are gone: so are all before them
_GONE = 0.5  # of a prompt: less of it served is a miss
_LIMITED = 0.03  # so much less than the line allows: something else is full
_SHORTEST = (16, 4096)  # tokens between which the shortest prompt that hits is sought


async def measure_cache(session: Session) -> None:
    plan = session.plan
    context = plan.contexts[len(plan.contexts) // 2]
    await session.measure("cache/steps", 2 * context, lambda: _steps(session, context))
    await session.measure("cache/shortest", 4 * _SHORTEST[1], lambda: _shortest(session))
    await session.measure("cache/tell", 6 * plan.fill_tokens[0], lambda: _tell(session))
    for seconds in plan.idle_seconds:
        if session.left_seconds() > seconds + 1:
            await session.measure(f"cache/idle/{seconds:g}", context, _after(session, context, seconds))
    if not plan.most_fill_tokens:
        return  # nor is the cache reset
    held_out = round((plan.fill_tokens[-2:][0] * plan.fill_tokens[-1]) ** 0.5) if plan.fill_tokens else 0
    for name, tokens in [*(("fill", t) for t in plan.fill_tokens), *([("holdout-fill", held_out)] * plan.holdout)]:
        await session.measure(f"{name}/{tokens}", _FIRST_CHECK * tokens, _filling(session, tokens))


async def _steps(session: Session, context: int) -> Record:
    """Prompts that leave one long prompt at several places: how far each was served."""
    prompts, random = session.prompts, session.prompts.random("steps")
    whole = prompts.cold("steps", prompts.characters(context))
    await session.ask(whole)
    forks = []
    for number in range(_FORKS):
        beginning = whole[: random.randrange(len(whole) // 4, len(whole))]
        answer = await _asked(session, beginning + prompts.stretch(f"fork/{number}", prompts.characters(48)))
        alone = await session.ask(beginning)  # only to count its tokens
        forks.append([session.tokens_of(beginning, alone), answer.cached_tokens])
    again = await _asked(session, whole)
    return {"forks": forks, "again": [session.tokens_of(whole, again), again.cached_tokens]}


async def _shortest(session: Session) -> Record:
    """Bisects for the shortest prompt of which a repetition is served from the cache at all."""
    low, high = _SHORTEST
    found = served = None
    while high - low > max(1, low // 16):
        middle = round((low * high) ** 0.5)
        text = session.prompts.cold(f"shortest/{middle}", session.prompts.characters(middle), body="shortest")
        tokens = session.tokens_of(text, await session.ask(text))
        cached = (await _asked(session, text)).cached_tokens
        if cached is None:
            break
        if cached:
            found, served, high = tokens, cached, middle
        else:
            low = middle
    return {"tokens": found, "cached_tokens": served}


async def _tell(session: Session) -> Record:
    """Times of hits and misses by length, for endpoints that do not report cached tokens."""
    lengths = {}
    for tokens in {*session.plan.fill_tokens, session.plan.contexts[len(session.plan.contexts) // 2]}:
        misses, hits = [], []
        for turn in range(3):
            text = session.prompts.cold(f"tell/{tokens}/{turn}", session.prompts.characters(tokens))
            misses.append((await session.ask(text)).first_token_seconds)
            hits.append((await session.ask(text)).first_token_seconds)
        lengths[str(tokens)] = [median(misses), median(hits)]
    return {"lengths": lengths}


async def _asked(session: Session, text: str) -> Answer:
    """One answer, with the tokens served from the cache wherever they can be had from."""
    if session.facts.cached_tokens_reported or not session.facts.hits_counted:
        return await session.ask(text)
    before = await _counted(session)
    answer = await session.ask(text)
    await asyncio.sleep(_COUNTER_SECONDS)
    after = await _counted(session)
    return replace(answer, cached_tokens=None if before is None or after is None else after - before)


async def _counted(session: Session) -> int | None:
    response = await session.client.get("/metrics")
    return None if response is None else hit_tokens(response.text)


async def _share(session: Session, text: str) -> tuple[float, int]:
    """How much of a prompt that was sent before is served from the cache, and its tokens."""
    answer = await _asked(session, text)
    tokens = session.tokens_of(text, answer)
    if answer.cached_tokens is not None:
        return answer.cached_tokens / tokens, tokens
    told = session.samples.records.get("cache/tell", {}).get("lengths", {})
    nearest = min(told, key=lambda length: abs(math.log(int(length) / tokens)), default=None)
    if nearest is None:
        return 0.0, tokens
    miss, hit = (seconds * tokens / int(nearest) for seconds in told[nearest])
    return float(np.clip((miss - answer.first_token_seconds) / max(miss - hit, 1e-9), 0, 1)), tokens


def _after(session: Session, context: int, seconds: float) -> Probe:
    """Whether a prompt is still there when nobody has asked for a while."""

    async def probe() -> Record:
        text = session.prompts.cold(f"idle/{seconds}", session.prompts.characters(context))
        await session.ask(text)
        begin = time.monotonic()
        await asyncio.sleep(seconds)
        age = time.monotonic() - begin
        share, _ = await _share(session, text)
        return {"age_seconds": age, "other_tokens": 0, "share": share}

    return probe


def _filling(session: Session, tokens: int) -> Probe:
    """Distinct prompts until the least recently used one is gone, then from the latest back to where misses begin."""

    async def probe() -> Record:
        return await _Filling(session, tokens).run()

    return probe


class _Filling:
    """One fill. Prompts are asked for by number; `order` has them by last use."""

    def __init__(self, session: Session, tokens: int) -> None:
        self._session, self._tokens = session, tokens
        self._characters = session.prompts.characters(tokens)
        self._order: list[int] = []
        self._sent: list[tuple[float, int]] = []  # when, and after how many tokens, by number
        self._filled = 0
        self._lengths: list[int] = []
        self._canaries: list[list[float]] = []
        self._asked_twice: set[int] = set()
        self._full = 0.0  # the largest share of a repeated prompt that was ever served
        self._began = time.monotonic()
        self._allowed = session.left_seconds() / 2

    def _text(self, number: int) -> str:
        return self._session.prompts.cold(f"fill/{self._tokens}/{number}", self._characters)

    async def run(self) -> Record:
        # What was used often before would stay, and what is new would go before it.
        was_reset = await self._session.client.reset_cache()
        text = self._text(-1)
        await self._session.ask(text)
        self._full, _ = await _share(self._session, text)
        check, evicted = _FIRST_CHECK, False
        while self._full and not evicted and self._room():
            await self._send(len(self._sent))
            if len(self._sent) >= check:
                evicted = await self._first_is_gone()
                check = math.ceil(check * _CHECK_STEP)
        evicted = evicted or (bool(self._sent) and await self._first_is_gone())
        held = await self._count() if evicted else self._filled * self._full
        return {
            "prompt_tokens": median(self._lengths) if self._lengths else self._tokens,
            "full": self._full,
            "filled_tokens": self._filled,
            "held_tokens": held,
            "evicted": evicted,
            "was_reset": was_reset,
            "canaries": self._canaries,
        }

    def _room(self) -> bool:
        return self._filled < self._session.plan.most_fill_tokens and time.monotonic() - self._began < self._allowed

    async def _send(self, number: int) -> None:
        text = self._text(number)
        answer = await self._session.ask(text)
        tokens = self._session.tokens_of(text, answer)
        self._filled += tokens
        self._lengths.append(tokens)
        self._sent.append((time.monotonic(), self._filled))
        self._order.append(number)

    async def _first_is_gone(self) -> bool:
        """Each prompt is asked for at most once here: asking makes it the latest."""
        number = self._order.pop(0)
        when, before = self._sent[number]
        share, _ = await _share(self._session, self._text(number))
        share = min(1.0, share / self._full)
        self._canaries.append([time.monotonic() - when, self._filled - before, share])
        self._order.append(number)
        self._asked_twice.add(number)
        return share < _GONE

    async def _count(self) -> float:
        """Tokens that are still served, from the latest prompt back until some in a row are gone; and of those before
        that were asked for twice, because a cache that counts uses keeps them longer."""
        held, gone = 0.0, 0
        for number in reversed(self._order):
            if gone >= _END and number not in self._asked_twice:
                continue
            share, tokens = await _share(self._session, self._text(number))
            held += share * tokens
            gone = gone + 1 if share < _GONE * self._full else gone if gone >= _END else 0
        return held


def cache_facts(session: Session) -> CacheFacts:
    """What the samples say."""
    records = session.samples.records
    steps = records.get("cache/steps", {"forks": [], "again": [0, None]})
    told = [(shared, cached) for shared, cached in steps["forks"] if cached]
    again, shortest = steps["again"], records.get("cache/shortest", {})
    served_tokens = [cached for _, cached in told] + [n for n in (again[1], shortest.get("cached_tokens")) if n]
    unit = math.gcd(*served_tokens) if len(served_tokens) >= _TELLING else None
    lags = [shared - cached for shared, cached in told]
    if again[1]:
        lags.append(again[0] - again[1])
    fills = _fills(session, "fill/")
    idle = [Retained(**_known(r, Retained)) for r in session.records("cache/idle/").values()]
    canaries = [Retained(*c) for r in session.records("fill/").values() for c in r["canaries"]]
    served = bool(again[1]) or any(r.share > _GONE for r in (*idle, *canaries))
    capacity, request, most = fit_capacity(fills) if served else (None, None, None)
    return CacheFacts(
        enabled=served,
        unit_tokens=unit,
        lag_tokens=max(lags, default=None),
        shortest_hit_tokens=shortest.get("tokens"),
        capacity_tokens=capacity,
        request_tokens=request,
        most_prompts=most,
        fills=fills,
        retained=(*idle, *canaries),
    )


def held_out_fills(session: Session) -> tuple[Fill, ...]:
    return _fills(session, "holdout-fill/")


def _fills(session: Session, start: str) -> tuple[Fill, ...]:
    return tuple(
        Fill(
            round(r["prompt_tokens"]),
            round(r["prompt_tokens"] * r["full"]),
            r["filled_tokens"],
            r["held_tokens"],
            r["evicted"],
        )
        for r in session.records(start).values()
    )


def _known(record: Record, kind: type[Retained]) -> Record:
    return {name: record[name] for name in kind.__dataclass_fields__}


def fit_capacity(fills: Sequence[Fill]) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Capacity in tokens; what each prompt takes beside its own, in tokens; and how many prompts there may be at most.

    n prompts of t served tokens fit while n * (t + request) <= capacity and n <= most. Three lengths tell both: the
    two longest give the first line, and if fewer of the shortest fit than it allows, their number is the second.
    """
    whole = sorted((fill for fill in fills if fill.evicted), key=lambda fill: fill.served_tokens)
    if not whole:
        most = max((fill.held_tokens for fill in fills), default=None)
        return (None if most is None else Estimate(most, most, None, Tag.BOUND)), None, None
    lengths = np.array([fill.served_tokens for fill in whole], np.float64)
    counts = np.array([fill.held_tokens for fill in whole]) / lengths
    on_line = slice(-2, None) if len(whole) > 2 else slice(None)
    capacity, request = _line(lengths[on_line], counts[on_line])
    if len(whole) > 2 and counts[0] * (lengths[0] + request) > (1 - _LIMITED) * capacity:
        capacity, request = _line(lengths, counts)
        limit = None
    else:
        limit = _within(float(counts[0]), 1.0) if len(whole) > 2 else None
    one = float(lengths[-1])  # the last prompt may be there or not
    return _within(capacity, one), None if len(whole) < 2 else _within(request, one * one / capacity), limit


def _line(lengths: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Capacity and request of count * (length + request) = capacity, by relative least squares; neither is negative."""
    if len(lengths) == 1:
        return float(counts[0] * lengths[0]), 0.0
    held = counts * lengths
    found = nnls(np.stack([np.ones_like(held), -counts], 1) / held[:, None], np.ones_like(held))[0]
    return float(found[0]), float(found[1])


def _within(value: float, step: float) -> Estimate:
    return Estimate(value, max(0.0, value - step), value + step, Tag.MEASURED)
