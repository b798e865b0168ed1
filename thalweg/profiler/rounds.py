"""What cells are like when what all of them had in common in a round is taken out.

Cells are measured in rounds, each once. A machine that is shared is faster in some rounds than in others, for all cells
alike; which round a cell misses, or has twice, must not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from statistics import median

Times = Mapping[str, Mapping[int, float]]  # seconds by cell and round

_SWEEPS = 10  # of median polish; it settles in a few


def shared_by_round(times: Times) -> dict[int, float]:
    """By how much, in logarithms, each round was slower than the median round, by median polish."""
    logs = {cell: {turn: log(seconds) for turn, seconds in rounds.items()} for cell, rounds in times.items()}
    by_round: dict[int, list[str]] = {}
    for cell, rounds in logs.items():
        for turn in rounds:
            by_round.setdefault(turn, []).append(cell)
    shared = dict.fromkeys(sorted(by_round), 0.0)
    for _ in range(_SWEEPS):
        own = {cell: median(value - shared[turn] for turn, value in rounds.items()) for cell, rounds in logs.items()}
        shared = {turn: median(logs[cell][turn] - own[cell] for cell in by_round[turn]) for turn in shared}
    usual = median(shared.values()) if shared else 0.0
    return {turn: value - usual for turn, value in shared.items()}


def typical(times: Times, shared: Mapping[int, float]) -> dict[str, float]:
    """Median seconds of each cell in a usual round. Rounds that `shared` does not know are taken as usual."""
    return {
        cell: exp(median(log(seconds) - shared.get(turn, 0.0) for turn, seconds in rounds.items()))
        for cell, rounds in times.items()
    }
