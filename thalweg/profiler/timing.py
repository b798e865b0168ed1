"""Times of single requests: to the first token over context and reuse, between tokens over batch and context.

All cells take turns in rounds, up and down the contexts, those of the hold-out among them: what else the machine does
meets all alike, and neighbours at the same moment. What is over soon is asked for several times in a round. The first
round of each cell only warms the endpoint up; it is not kept as a time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from thalweg.profiler.client import Answer
from thalweg.profiler.plan import Plan, between
from thalweg.profiler.profile import Holdout, TpotCell, TtftCell
from thalweg.profiler.rounds import Times, shared_by_round, typical
from thalweg.profiler.session import Session
from thalweg.profiler.store import Record

_MOST_VISITS = 5
_AIMS = 3  # tries to meet a length
_HELD_OUT = "holdout-"
_WAVES = 4  # in which they may come
_MOST_OUTPUT = 8  # times as many tokens as planned
_FULL = 0.9  # of the cache
_LEAST_TOKENS = 16  # of each request while all give tokens


@dataclass(frozen=True, slots=True)
class _Cell:
    """A context at which times are taken; `batch` None: of first tokens, at these shares of reuse."""

    kind: str
    context: int
    batch: int | None
    reuses: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.context}" + ("" if self.batch is None else f"/{self.batch}")


def _cells(plan: Plan) -> list[_Cell]:
    cells = [_Cell("ttft", context, None, plan.reuses) for context in plan.contexts]
    cells += [_Cell("tpot", context, batch) for context in plan.decode_contexts for batch in plan.batches]
    if plan.holdout:
        middles = tuple((a + b) / 2 for a, b in pairwise(plan.reuses))
        cells += [_Cell(_HELD_OUT + "ttft", c, None, (0.0, *middles)) for c in between(plan.contexts)]
        batches = sorted({*between(plan.batches), *plan.batches})
        cells += [_Cell(_HELD_OUT + "tpot", c, b) for c in between(plan.decode_contexts) for b in batches]
    return cells


async def measure_surfaces(session: Session) -> None:
    """Rounds over all cells, as many as wanted or as the time allows."""
    cells = _cells(session.plan)
    for context in sorted({cell.context for cell in cells}):
        shares = {reuse for cell in cells if cell.context == context for reuse in cell.reuses if 0 < reuse < 1}
        await _aim(session, context, sorted(shares))
    prefilled: set[str] = set()
    for turn in range(session.plan.samples + 1):
        for cell in sorted(cells, key=lambda c: (c.context, c.batch or 0), reverse=bool(turn % 2)):
            await _measure(session, cell, turn, prefilled)


async def _aim(session: Session, context: int, shares: list[float]) -> None:
    """Find how many characters of this context's text are as many tokens, and where the shares of it end."""

    async def probe() -> Record:
        characters = session.prompts.characters(context)
        for attempt in range(_AIMS):
            text = session.prompts.cold(f"aim/{context}/{attempt}", characters, body=f"text/{context}")
            tokens = session.tokens_of(text, await session.ask(text))
            session.prompts.characters_per_token = characters / tokens
            if abs(tokens / context - 1) < 0.02:
                break
            characters = round(characters * context / tokens)
        cuts = {}
        for share in shares:
            cut = share * characters
            for _ in range(_AIMS):  # cheap: all of it was sent before
                beginning = text[: round(cut)]
                cut *= share * context / session.tokens_of(beginning, await session.ask(beginning))
            cuts[str(share)] = min(round(cut), characters - 1)
        return {"characters": characters, "cuts": cuts}

    await session.measure(f"aim/{context}", context, probe)


async def _measure(session: Session, cell: _Cell, turn: int, prefilled: set[str]) -> None:
    aim = session.samples.records.get(f"aim/{cell.context}")
    if aim is None:
        return  # already said to be left out
    key, characters = f"{cell.name}#{turn}", aim["characters"]
    if cell.batch is None:
        tokens = cell.context * (1 + sum(1 - reuse for reuse in cell.reuses if reuse))
        await session.measure(key, tokens, lambda: _visits(session, key, cell, aim))
    elif _runs_together(session, cell, cell.batch, turn):
        batch = cell.batch
        await session.measure(
            key, cell.context * batch, lambda: _between_tokens(session, cell, batch, characters, prefilled)
        )


def _runs_together(session: Session, cell: _Cell, batch: int, turn: int) -> bool:
    """Whether so many requests fit the cache at once, as far as the endpoint says, or the first round has shown."""
    most = session.facts.stated_capacity_tokens
    first = session.samples.records.get(f"{cell.name}#0", {"seconds": 1.0})
    if (most and batch * cell.context > _FULL * most) or (turn and first["seconds"] is None):
        session.left_out[cell.name] = "the requests do not fit the cache, or did not run side by side"
        return False
    return True


async def _visits(session: Session, key: str, cell: _Cell, aim: Record) -> Record:
    samples: list[Record] = []
    begin = time.perf_counter()
    for number in range(_MOST_VISITS):
        samples += await _first_tokens(session, f"{key}/{number}", cell, aim)
        if time.perf_counter() - begin > session.plan.visit_seconds:
            break
    return {"samples": samples}


async def _first_tokens(session: Session, key: str, cell: _Cell, aim: Record) -> list[Record]:
    """Cold, then beginnings of it with new text behind, each once it was a prompt itself, then all of it again."""
    prompts = session.prompts
    whole = prompts.cold(key, aim["characters"], body=f"text/{cell.context}")
    samples = [_sample(session, whole, await session.ask(whole), 0.0, 0)]
    for reuse in cell.reuses:
        if not 0 < reuse < 1:
            continue
        cut = aim["cuts"][str(reuse)]
        beginning, salt = whole[:cut], prompts.salt(f"{key}/{reuse}")
        shared = session.tokens_of(beginning, await session.ask(beginning))
        text = beginning + (salt + whole[cut:])[: len(whole) - cut]
        samples.append(_sample(session, text, await session.ask(text), reuse, shared))
    if 1.0 in cell.reuses:
        answer = await session.ask(whole)
        samples.append(_sample(session, whole, answer, 1.0, session.tokens_of(whole, answer)))
    return samples


def _sample(session: Session, text: str, answer: Answer, row: float, shared: int) -> Record:
    tokens = session.tokens_of(text, answer)
    return {
        "row": row,
        "context_tokens": tokens,
        "reuse": shared / tokens,
        "cached_tokens": answer.cached_tokens,
        "seconds": answer.first_token_seconds,
    }


async def _between_tokens(session: Session, cell: _Cell, batch: int, characters: int, prefilled: set[str]) -> Record:
    """All requests at once, their prompts in the cache: the time while all of them give tokens."""
    context = cell.context
    texts = [session.prompts.cold(f"decode/{context}/{i}", characters, body=f"text/{context}") for i in range(batch)]
    for text in texts:
        if text not in prefilled:
            await session.ask(text)
            prefilled.add(text)
    output = _output_tokens(session, cell)
    seconds = tokens = 0.0
    context_tokens: list[int] = []
    for _ in range(_WAVES):
        answers = await asyncio.gather(*(session.ask(text, output) for text in texts))
        begin, end = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
        if end > begin:
            seconds += end - begin
            tokens += sum(a.tokens_between(begin, end) for a in answers)
        context_tokens += [session.tokens_of(t, a) for t, a in zip(texts, answers, strict=True)]
        if seconds >= session.plan.visit_seconds:
            break
    return {
        "batch": batch,
        "context_tokens": median(context_tokens) + output // 2,
        "seconds": batch * seconds / tokens if tokens >= _LEAST_TOKENS * batch else None,
        "output_tokens": output,
    }


def _output_tokens(session: Session, cell: _Cell) -> int:
    """Enough, by the first round, to take a while."""
    planned = session.plan.output_tokens
    seconds = session.samples.records.get(f"{cell.name}#0", {}).get("seconds")
    return (
        planned
        if not seconds
        else min(_MOST_OUTPUT * planned, max(planned, round(session.plan.visit_seconds / seconds)))
    )


def ttft_cells(session: Session, start: str = "") -> tuple[TtftCell, ...]:
    """Samples by cell."""
    kept = _ttft_samples(session, start)
    settled = typical(_times(kept), shared_by_round(_times(_ttft_samples(session, ""))))
    cells = []
    for name, rounds in kept.items():
        samples = [sample for group in rounds.values() for sample in group]
        cached = [s["cached_tokens"] for s in samples if s["cached_tokens"] is not None]
        cells.append(
            TtftCell(
                round(median(s["context_tokens"] for s in samples)),
                median(s["reuse"] for s in samples),
                samples[0]["row"],
                round(median(cached)) if cached else None,
                settled[name],
                tuple(s["seconds"] for s in samples),
            )
        )
    return tuple(sorted(cells, key=lambda cell: (cell.context_tokens, cell.row)))


def tpot_cells(session: Session, start: str = "") -> tuple[TpotCell, ...]:
    """Samples by cell. Those of requests that hardly ran side by side are no samples."""
    kept = _tpot_samples(session, start)
    settled = typical(_times(kept), shared_by_round(_times(_tpot_samples(session, ""))))
    cells = []
    for name, rounds in kept.items():
        samples = [sample for group in rounds.values() for sample in group]
        context = round(median(s["context_tokens"] for s in samples))
        cells.append(TpotCell(samples[0]["batch"], context, settled[name], tuple(s["seconds"] for s in samples)))
    return tuple(sorted(cells, key=lambda cell: (cell.batch, cell.context_tokens)))


def holdout_cells(session: Session) -> Holdout:
    return Holdout(ttft_cells(session, _HELD_OUT), tpot_cells(session, _HELD_OUT))


Rounds = dict[str, dict[int, list[Record]]]  # samples by cell and round


def _ttft_samples(session: Session, start: str) -> Rounds:
    found: Rounds = {}
    for key, record in session.records(f"{start}ttft/").items():
        name, turn = key.split("#")
        for sample in record["samples"] if turn != "0" else ():
            found.setdefault(f"{name}/{sample['row']}", {}).setdefault(int(turn), []).append(sample)
    return found


def _tpot_samples(session: Session, start: str) -> Rounds:
    found: Rounds = {}
    for key, record in session.records(f"{start}tpot/").items():
        name, turn = key.split("#")
        if turn != "0" and record["seconds"] is not None:
            found.setdefault(name, {})[int(turn)] = [record]
    return found


def _times(samples: Rounds) -> Times:
    return {
        name: {turn: median(s["seconds"] for s in group) for turn, group in rounds.items()}
        for name, rounds in samples.items()
    }
