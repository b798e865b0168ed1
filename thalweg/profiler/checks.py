"""Correctness from outside: the same request cold, served from the cache, and in company must be answered alike.

Prompts are real text of lengths that leave each remainder modulo 4: a compressor of four tokens has another state at
the end of each. Needles ask for one fact that was hidden in the text; continuations compare more tokens.
"""

from __future__ import annotations

import asyncio

from thalweg.profiler.profile import Check
from thalweg.profiler.session import Probe, Session
from thalweg.profiler.store import Record

_REMAINDERS = 4
_ANSWER_TOKENS = 24
_COMPANIONS = 3
_TRIES = 3  # paddings to meet a remainder


async def measure_checks(session: Session) -> None:
    for context in session.plan.check_contexts:
        for remainder in range(_REMAINDERS):
            for what in ("needle", "continuation"):
                key = f"check/{what}/{context}/{remainder}"
                await session.measure(key, 3 * context, _probe(session, key, what, (context, remainder)))


def _probe(session: Session, key: str, what: str, where: tuple[int, int]) -> Probe:
    api = "chat" if what == "needle" else None
    (context, remainder), prompts = where, session.prompts

    def made(padding: int, salt: str) -> tuple[str, str | None]:
        if what == "needle":
            return prompts.needle(key, prompts.characters(context), padding, salt)
        # Behind salts of any length the same text, so that only the padding changes how many tokens there are.
        return prompts.salt(salt) + prompts.stretch(key, prompts.characters(context)) + " data" * padding, None

    async def probe() -> Record:
        padding = 0
        for attempt in range(_TRIES):
            text, _ = made(padding, f"{key}/{attempt}")
            tokens = session.tokens_of(text, await session.ask(text, 1, api))
            if tokens % _REMAINDERS == remainder:
                break
            padding += (remainder - tokens) % _REMAINDERS
        text, expected = made(padding, f"{key}/asked")
        cold = await session.ask(text, _ANSWER_TOKENS, api)
        warm = await session.ask(text, _ANSWER_TOKENS, api)
        others = [prompts.cold(f"{key}/other/{i}", len(text)) for i in range(_COMPANIONS)]
        company, *_ = await asyncio.gather(
            session.ask(text, _ANSWER_TOKENS, api), *(session.ask(other, _ANSWER_TOKENS) for other in others)
        )
        tokens = session.tokens_of(text, cold)
        return {
            "what": what,
            "prompt_tokens": tokens,
            "remainder": tokens % _REMAINDERS,
            "cold": cold.text,
            "warm": warm.text,
            "company": company.text,
            "expected": expected,
            "cached_tokens": warm.cached_tokens,
        }

    return probe


def checks(session: Session) -> tuple[Check, ...]:
    names = Check.__dataclass_fields__
    return tuple(Check(**{name: r[name] for name in names}) for r in session.records("check/").values())
