"""What became of a simulation: a row for every request, and figures over all of them."""

from __future__ import annotations

import csv
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (50, 90, 99)
_SECONDS = ("arrived", "started", "first_token", "finished")
_COUNTS = (
    "replica", "prompt_tokens", "output_tokens", "device_tokens", "host_tokens", "disk_tokens", "replayed_tokens",
    "preemptions",
)  # fmt: skip
_WORDS = ("request", "finish", "reason")


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """One request. Times are seconds of the virtual clock; nan: it did not come to that. `reason` is why no more of its
    prompt was cached; `finish` is length, cancelled or error."""

    request: str
    replica: int
    arrived: float
    started: float
    first_token: float
    finished: float
    prompt_tokens: int
    output_tokens: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int
    replayed_tokens: int
    preemptions: int
    finish: str
    reason: str


class Outcomes:
    """Rows in columns: a million of them take about 150 MB."""

    def __init__(self) -> None:
        self._seconds = {name: array("d") for name in _SECONDS}
        self._counts = {name: array("q") for name in _COUNTS}
        self._words: dict[str, list[str]] = {name: [] for name in _WORDS}

    def __len__(self) -> int:
        return len(self._words["request"])

    def add(self, row: RequestOutcome) -> None:
        for columns in (self._seconds, self._counts, self._words):
            for name, column in columns.items():
                column.append(getattr(row, name))

    def rows(self) -> Iterable[tuple[Any, ...]]:
        names = self.names()
        return zip(*(self._column(name) for name in names), strict=True)

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(RequestOutcome.__dataclass_fields__)

    def _column(self, name: str) -> Any:
        return self._seconds.get(name) or self._counts.get(name) or self._words.get(name) or []

    def seconds(self, name: str) -> npt.NDArray[np.float64]:
        return np.frombuffer(self._seconds[name], np.float64) if len(self) else np.empty(0)

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        return np.frombuffer(self._counts[name], np.int64) if len(self) else np.empty(0, np.int64)

    def words(self, name: str) -> list[str]:
        return self._words[name]

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.names())
            writer.writerows(
                tuple("" if isinstance(v, float) and math.isnan(v) else v for v in row) for row in self.rows()
            )


@dataclass(frozen=True, slots=True)
class GroupPeak:
    """The most blocks of a group's pool that requests held at once on one replica."""

    group: str
    total_blocks: int
    peak_blocks: int


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """What one replica counted."""

    steps: int
    busy_seconds: float
    computed_tokens: int
    preemptions: int
    most_waiting: int
    peaks: tuple[GroupPeak, ...]
    evicted: Mapping[str, int]  # units or checkpoints, by the group that needed room
    tiers: Mapping[str, Mapping[str, int]]  # what each lower tier counted
    counters: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Requests and replicas. `skipped_turns` were never asked, because a turn before them was cancelled or refused."""

    requests: Outcomes
    replicas: tuple[ReplicaFigures, ...]
    skipped_turns: int = 0

    @property
    def makespan(self) -> float:
        """From the first arrival to the last end, in seconds."""
        if not len(self.requests):
            return 0.0
        return float(self.requests.seconds("finished").max() - self.requests.seconds("arrived").min())

    def summary(self) -> dict[str, Any]:
        """Plain values, for a table or as JSON. Latencies are of requests that ran to their end."""
        rows = self.requests
        finish = Counter(rows.words("finish"))
        done = np.array([word == "length" for word in rows.words("finish")], bool)
        arrived, first, ended = (rows.seconds(n)[done] for n in ("arrived", "first_token", "finished"))
        outputs, prompts = rows.counts("output_tokens"), rows.counts("prompt_tokens")
        several = outputs[done] > 1
        paces = (ended - first)[several] / (outputs[done][several] - 1)
        span = self.makespan or math.nan
        hits = {tier: int(rows.counts(f"{tier}_tokens").sum()) for tier in ("device", "host", "disk", "replayed")}
        total = int(prompts.sum())
        return {
            "requests": len(rows),
            "skipped_turns": self.skipped_turns,
            "finished": dict(sorted(finish.items())),
            "makespan_seconds": _plain(span),
            "ttft_seconds": _spread(first - arrived),
            "tpot_seconds": _spread(paces),
            "queue_seconds": _spread(rows.seconds("started")[done] - arrived),
            "end_to_end_seconds": _spread(ended - arrived),
            "prompt_tokens": total,
            "output_tokens": int(outputs.sum()),
            "prompt_tokens_per_second": _plain(total / span),
            "output_tokens_per_second": _plain(int(outputs.sum()) / span),
            "requests_per_second": _plain(len(rows) / span),
            "cached_tokens": hits,
            "hit_rate": _plain((total and sum(hits[t] for t in ("device", "host", "disk")) / total) or 0.0),
            "miss_reasons": dict(sorted(Counter(rows.words("reason")).items())),
            "preemptions": sum(r.preemptions for r in self.replicas),
            "evicted": _summed(r.evicted for r in self.replicas),
            "replicas": [_replica(r, span) for r in self.replicas],
        }


def _replica(figures: ReplicaFigures, span: float) -> dict[str, Any]:
    return {
        "steps": figures.steps,
        "busy_share": _plain(figures.busy_seconds / span),
        "computed_tokens": figures.computed_tokens,
        "preemptions": figures.preemptions,
        "most_waiting": figures.most_waiting,
        "peak_use": {p.group: {"blocks": p.peak_blocks, "of": p.total_blocks} for p in figures.peaks},
        "evicted": dict(figures.evicted),
        "tiers": {name: dict(counts) for name, counts in figures.tiers.items()},
        "counters": dict(figures.counters),
    }


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _spread(values: npt.NDArray[np.float64]) -> dict[str, float] | None:
    """Mean, percentiles and the most; None of nothing."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    places = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, places, strict=True)}
    return {"mean": float(values.mean()), **named, "most": float(values.max())}
