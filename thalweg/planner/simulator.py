"""A deployment on a virtual clock: replicas, a router before them, and a trace that goes through.

Time goes forward in one order for all: no replica runs past a moment at which another one may still cause an arrival.
The same trace, specification and cost give the same result; nothing is drawn here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from thalweg.engine.plan import StepPlan
from thalweg.planner.coarse_cost import CoarseCost
from thalweg.planner.cost import StepCost
from thalweg.planner.outcome import Outcomes, RequestOutcome, SimulationResult
from thalweg.planner.replica import Asked, Replica, ReplicaSpec
from thalweg.planner.routing import Router, Routing
from thalweg.planner.tokens import SyntheticTokens
from thalweg.planner.trace import Session


@dataclass(slots=True)
class _Talk:
    """A session under way."""

    session: Session
    turn: int = 0
    replica: int = 0


class Simulation:
    """See the module. `run` once."""

    def __init__(
        self,
        spec: ReplicaSpec,
        cost: StepCost,
        *,
        replicas: int = 1,
        routing: Routing = Routing.STICKY,
        bulk: bool = True,
        on_plan: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        self._unit = spec.policy.unit_tokens
        self._rows = Outcomes()
        coarse = CoarseCost(cost)
        self.replicas = [Replica(i, spec, coarse, self._ended, bulk=bulk, on_plan=on_plan) for i in range(replicas)]
        self._router = Router(routing, self.replicas)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._serial = 0
        self._talks: dict[str, _Talk] = {}  # by the id of their open request
        self._following = 0  # turns to come in sessions under way
        self._skipped = 0
        self._progress: Callable[[int], None] = _unseen

    def run(self, sessions: Iterable[Session], progress: Callable[[int], None] | None = None) -> SimulationResult:
        """Serve a whole trace. `progress` hears how many requests have ended, now and then."""
        self._progress = progress or _unseen
        trace = iter(sessions)
        self._next_session(trace)
        while True:
            reached = self._advance(self._events[0][0] if self._events else math.inf)
            if not self._events:
                break
            if self._events[0][0] <= reached:
                heapq.heappop(self._events)[2](reached)
        return SimulationResult(self._rows, tuple(r.figures() for r in self.replicas), self._skipped)

    def _at(self, seconds: float, action: Callable[[float], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (seconds, self._serial, action))

    def _next_session(self, trace: Iterator[Session]) -> None:
        """Put the next session of the trace on the agenda; it brings the one after it."""
        session = next(trace, None)
        if session is None:
            return

        def begin(seconds: float) -> None:
            self._next_session(trace)
            self._following += len(session.turns) - 1
            self._ask(_Talk(session), seconds)

        self._at(session.start, begin)

    def _ask(self, talk: _Talk, seconds: float) -> None:
        session, turn = talk.session, talk.session.turns[talk.turn]
        name = session.name if len(session.turns) == 1 else f"{session.name}/{talk.turn}"
        tokens = SyntheticTokens(turn.pieces, turn.output, self._unit)
        asked = Asked(name, session.tenant, turn, tokens, seconds)
        place = self._router.choose(session.name, lambda replica: self.replicas[replica].cached_tokens(asked))
        talk.replica = place
        self._talks[name] = talk
        self.replicas[place].submit(asked)
        if turn.cancel_after is not None:
            self._at(seconds + turn.cancel_after, lambda at: self.replicas[place].cancel(name, at))

    def _ended(self, row: RequestOutcome) -> float:
        """Take down what became of a request; returns when it causes the next one."""
        self._rows.add(row)
        if len(self._rows) % 256 == 0:
            self._progress(len(self._rows))
        talk = self._talks.pop(row.request)
        left = len(talk.session.turns) - talk.turn - 1
        if left and row.finish == "length":
            talk.turn += 1
            self._following -= 1
            seconds = row.finished + talk.session.turns[talk.turn].pause
            self._at(seconds, lambda at: self._ask(talk, at))
            return seconds
        self._following -= left
        self._skipped += left
        self._router.forget(talk.session.name)
        return math.inf

    def _advance(self, until: float) -> float:
        """Run the replicas up to the next event, at most to `until`; returns to when they came."""
        if not self._following or len(self.replicas) == 1:
            for replica in self.replicas:
                replica.run_until(until)
                until = min(until, self._events[0][0]) if self._events else until
            return until
        while True:
            order = sorted((replica.next_seconds, replica.number) for replica in self.replicas)
            first, number = order[0]
            if first >= until:
                break
            self.replicas[number].run_until(min(until, max(order[1][0], math.nextafter(first, math.inf))))
            until = min(until, self._events[0][0]) if self._events else until
        for replica in self.replicas:
            replica.run_until(until)
        return until


def _unseen(ended: int) -> None:
    """Nobody watches."""
