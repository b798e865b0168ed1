"""One measurement under way: whom to ask, what is known already, and how much time is left."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from thalweg.errors import ThalwegError, UnavailableError
from thalweg.profiler.client import Answer, Client, Form
from thalweg.profiler.plan import SHARES, STAGES, Plan
from thalweg.profiler.profile import EndpointFacts
from thalweg.profiler.prompts import Prompts
from thalweg.profiler.store import Record, SampleFile

Probe = Callable[[], Awaitable[Record]]
Report = Callable[[str, float], None]  # what is measured now, and the share of the time that is used up
_MOST_FAILURES = 3  # of probes in a row
_TELLING_TOKENS = 1000  # a cold prompt of so many says how fast they are read
_FIRST_TOKENS_PER_SECOND = 2000.0  # until a prompt was timed


class Session:
    """Measures probe by probe. A probe is named by its key; what has a sample is not measured again."""

    def __init__(
        self, client: Client, form: Form, plan: Plan, samples: SampleFile, report: Report, facts: EndpointFacts
    ) -> None:
        self.client, self.form, self.plan, self.samples = client, form, plan, samples
        self.facts = facts
        self.prompts = Prompts(plan.seed)
        self.left_out: dict[str, str] = {}
        self._report = report
        self._durations: dict[str, float] = {}
        self._speeds: list[float] = []  # of cold prompts, in tokens a second
        self._failures = 0
        self._deadline = plan.budget_seconds

    def begin(self, stage: str) -> bool:
        """Whether this stage is wanted; from now on probes must end within its part of the time."""
        share = sum(SHARES[name] for name in STAGES[: STAGES.index(stage) + 1])
        self._deadline = share * self.plan.budget_seconds
        return stage in self.plan.stages

    def left_seconds(self) -> float:
        """Of the stage."""
        return self._deadline - self.samples.seconds

    async def measure(self, key: str, tokens: float, probe: Probe) -> Record | None:
        """The sample of this key, measured now if there is none. `tokens`: about how many must be computed for it.

        None if the time does not suffice or the endpoint refused; UnavailableError after three failures in a row.
        """
        if key in self.samples.records:
            return self.samples.records[key]
        kind = key.split("#")[0]
        speed = median(self._speeds) if self._speeds else _FIRST_TOKENS_PER_SECOND
        expected = self._durations.get(kind, 1.5 * tokens / speed)
        if expected > self.left_seconds():
            self.left_out[kind] = f"time: about {expected:.0f} s needed, {max(0.0, self.left_seconds()):.0f} s left"
            return None
        self._report(key, self.samples.seconds / self.plan.budget_seconds)
        begin = time.perf_counter()
        try:
            record = await probe()
        except ThalwegError as error:
            self._failures += 1
            self.left_out[kind] = error.message
            if self._failures >= _MOST_FAILURES:
                raise UnavailableError(f"three probes in a row failed, the last ({key}): {error.message}") from error
            return None
        took = time.perf_counter() - begin
        self._failures = 0
        self.left_out.pop(kind, None)
        self._durations[kind] = max(took, self._durations.get(kind, 0.0))
        self.samples.add(key, record, took)
        return record

    def omissions(self) -> tuple[str, ...]:
        """What has no sample, and which cells had fewer rounds than wanted."""
        rounds: dict[str, int] = {}
        for key in self.samples.records:
            kind, _, turn = key.partition("#")
            if turn and (turn != "0" or "/" not in kind):  # the first round of cells is warm-up
                rounds[kind] = rounds.get(kind, 0) + 1
        missing = [f"{kind}: {why}" for kind, why in sorted(self.left_out.items()) if kind not in rounds]
        few = sorted({rounds[kind] for kind in self.left_out if kind in rounds})
        if few:
            span = str(few[0]) if few[0] == few[-1] else f"{few[0]} to {few[-1]}"
            missing.append(f"rounds: {len(set(self.left_out) & set(rounds))} cells have {span} only")
        return tuple(missing)

    async def ask(self, text: str, output_tokens: int = 1, api: str | None = None) -> Answer:
        """One answer; what it says of lengths is kept in mind."""
        answer = await self.client.ask(self.form, text, output_tokens, api)
        tokens = self.tokens_of(text, answer)
        if tokens >= _TELLING_TOKENS and not answer.cached_tokens:
            self._speeds.append(tokens / answer.first_token_seconds)
        return answer

    def tokens_of(self, text: str, answer: Answer) -> int:
        """Of the prompt: as reported, else estimated."""
        return answer.prompt_tokens or round(len(text) / self.prompts.characters_per_token)

    def records(self, start: str) -> dict[str, dict[str, Any]]:
        """All samples whose keys begin so."""
        return {key: record for key, record in self.samples.records.items() if key.startswith(start)}
