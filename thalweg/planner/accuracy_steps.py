"""The step layer of the accuracy check: timed steps of our own engine, fitted on some and predicted on the others.

No GPU's steps of V4 are published, so these are of our CPU engine with the embedded model: the same protocol, real
steps of prompts, decodes and both together, up to 256K tokens of context.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from thalweg.planner.accuracy import Score, Trial, score
from thalweg.planner.accuracy_kernels import FOLDS, LONG_CONTEXT, SHORT_CONTEXT
from thalweg.planner.cost import Estimate, Origin, StepWork
from thalweg.planner.fitting import Array, GroupedFit
from thalweg.planner.tables import Row, read_rows

MACHINE = "engine"
NOISE = 0.1  # of steps of a millisecond beside other programs
WIDTHS = {"prompt": 0.065, "mixed": 0.065, "decode": 0.25}  # log, as in kernel_times: held-out 80% quantiles
Step = tuple[StepWork, float]


def step_rows(rows: Sequence[Row]) -> list[Step]:
    """Steps of the table: chunks as `new+past;...`, counts of decodes, seconds. A run of decodes of as many sequences
    is one step, its middle and median: which of them close a compression window is no matter of planning."""
    steps: list[Step] = []
    timed = [(_work(row), float(row["seconds"])) for row in rows]
    for (chunks, _), found in groupby(timed, lambda step: (step[0].chunks, step[0].decodes)):
        run = list(found)
        if chunks:
            steps += run
        else:
            steps.append((run[len(run) // 2][0], float(np.median([seconds for _, seconds in run]))))
    return steps


def _work(row: Row) -> StepWork:
    parts = (chunk.split("+") for chunk in row["chunks"].split(";") if chunk)
    chunks = tuple((int(new), int(past)) for new, past in parts)
    counts = (int(row[name]) for name in ("decodes", "decode_tokens", "decode_context", "longest_context", "sampled"))
    return StepWork(chunks, *counts)


def step_layer() -> list[Score]:
    """Scores of the package's steps: random fifths, and contexts of 128K and more from those up to 64K."""
    steps = step_rows(read_rows("engine_steps.csv"))
    inside: list[Trial] = []
    for fold in range(FOLDS):
        kept = [s for i, s in enumerate(steps) if _fold(i) != fold]
        inside += trials(kept, [s for i, s in enumerate(steps) if _fold(i) == fold], Origin.INTERPOLATED)
    short = [s for s in steps if deepest(s[0]) <= SHORT_CONTEXT]
    beyond = [s for s in steps if deepest(s[0]) >= LONG_CONTEXT]
    far = trials(short, beyond, Origin.EXTRAPOLATED)
    slices = (("interpolated", inside), ("extrapolated to 256K", far))
    scores = [score("step", name, found) for name, found in slices]
    scores += [
        score("step", f"{name}: {kind}", [t for t in found if t.what == kind])
        for name, found in slices
        for kind in ("prompt", "decode", "mixed")
    ]
    return [s for s in scores if s]


def trials(fitted: Sequence[Step], held_out: Sequence[Step], origin: Origin) -> list[Trial]:
    """Predictions of steps from others."""
    fits = GroupedFit(
        [(MACHINE, _sort(work)) for work, _ in fitted],
        np.array([_parts(work) for work, _ in fitted]),
        np.array([_place(work) for work, _ in fitted]),
        np.array([seconds for _, seconds in fitted]),
        NOISE,
    )
    per_token = float(np.median([s / w.tokens for w, s in fitted if w.chunks]))
    per_decode = float(np.median([s / w.decodes for w, s in fitted if not w.chunks]))
    found = []
    for work, seconds in held_out:
        guess = fits.fit((MACHINE, _sort(work))).seconds(_parts(work), _place(work))
        constant = per_token * work.tokens if work.chunks else per_decode * work.decodes
        width = math.exp(WIDTHS[_sort(work)])
        estimate = Estimate(guess, guess / width, guess * width, origin)
        found.append(Trial(_sort(work), seconds, estimate, {"constant rate": constant}))
    return found


def deepest(work: StepWork) -> int:
    """The longest context of a step."""
    return max([work.longest_context, *(past for _, past in work.chunks)])


def _sort(work: StepWork) -> str:
    if work.chunks:
        return "mixed" if work.decodes else "prompt"
    return "decode"


def _fold(index: int) -> int:
    return zlib.crc32(str(index).encode()) % FOLDS


def _parts(work: StepWork) -> Array:
    """What a step's time is a sum of: the step, chunks, prompt tokens and their contexts, decodes and theirs."""
    new = sum(n for n, _ in work.chunks)
    scanned = sum(n * (past + n / 2) for n, past in work.chunks)
    counts = (1, len(work.chunks), new, scanned, work.decode_tokens, work.decode_context, bool(work.decodes))
    return np.array(counts, float) * np.array([1e-4, 1e-4, 1e-5, 1e-10, 1e-4, 1e-9, 1e-4])


def _place(work: StepWork) -> Array:
    """Sizes between which errors are alike, in octaves."""
    return np.array([math.log2(work.tokens), math.log2(deepest(work) + 1024), 2 * math.log2(1 + work.decodes)])
