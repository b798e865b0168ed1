"""How mature each GPU kernel is, on a ladder of six levels, from recorded evidence alone.

A level is held only with all below it, for one architecture, and by evidence that was got with the very sources that
are there now. Nothing is projected: without a measurement there is a floor, and what others have published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.kernels.spec import OpSpec

LEVELS = (
    "reference only",
    "right in the interpreter, with fp32 and bfloat16 inputs",
    "compiles: no spill, fits, tensor cores where it multiplies",
    "right on the device, against float64",
    "timed: at its share of the floor in decode and prefill",
    "its share of the step is known, and the gain end to end",
)
DTYPES = ("float32", "bfloat16")
CHECKED, COMPILED, TIMED, STEPS = "triton_checked", "triton_compiled", "triton_timed", "triton_steps"  # .jsonl

# The least share of the floor for level 4, decode and prefill, where memory or arithmetic binds: what Triton was
# expected to reach on H100 before any of it ran there, from published kernels (docs/gpu-kernels.md).
TARGETS: Mapping[str, tuple[float, float]] = {
    "index_topk": (0.70, 0.35),
    "attention": (0.60, 0.35),
    "experts": (0.60, 0.60),
    "linear": (0.60, 0.60),
    "grouped_linear": (0.60, 0.60),
}
OTHERS = (0.80, 0.80)  # what moves bytes and computes little


@dataclass(frozen=True, slots=True)
class Evidence:
    """Lines of the four kinds of record, each a JSON object; `hashes` are of the sources as they are now, by op."""

    hashes: Mapping[str, str]
    checked: tuple[Mapping[str, Any], ...] = ()
    compiled: tuple[Mapping[str, Any], ...] = ()
    timed: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()

    def of(self, lines: Iterable[Mapping[str, Any]], op: str) -> list[Mapping[str, Any]]:
        """The lines about an op that were got with its present sources."""
        return [line for line in lines if line["op"] == op and line["sources"] == self.hashes.get(op)]


@dataclass(frozen=True, slots=True)
class Maturity:
    """One op on one architecture. `why_not` says what the next level lacks."""

    op: str
    arch: str
    level: int
    why_not: str
    compiled: tuple[Mapping[str, Any], ...] = field(repr=False, default=())
    timed: tuple[Mapping[str, Any], ...] = field(repr=False, default=())


def read_evidence(folder: Path, hashes: Mapping[str, str]) -> Evidence:
    """The records of a folder, as `kernels verify`, `kernels compile` and benchmarks/gpu_kernels.py write them."""
    lines = {name: _lines(folder / f"{name}.jsonl") for name in (CHECKED, COMPILED, TIMED, STEPS)}
    return Evidence(hashes, lines[CHECKED], lines[COMPILED], lines[TIMED], lines[STEPS])


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.exists():
        return ()
    return tuple(json.loads(line) for line in path.read_text().splitlines() if line.strip())


def maturity(spec: OpSpec, arch: str, evidence: Evidence) -> Maturity:
    """The highest level that the evidence carries."""
    compiled = tuple(line for line in evidence.of(evidence.compiled, spec.name) if line["arch"] == arch)
    timed = tuple(line for line in evidence.of(evidence.timed, spec.name) if line["arch"] == arch)
    lacks = (
        _unchecked(evidence.of(evidence.checked, spec.name), "interpreter"),
        _uncompiled(compiled),
        _unchecked(evidence.of(evidence.checked, spec.name), arch),
        _untimed(spec.name, timed),
        "" if any(line["arch"] == arch for line in evidence.of(evidence.steps, spec.name)) else "no step was measured",
    )
    if spec.name not in evidence.hashes:
        return Maturity(spec.name, arch, 0, "there is no Triton kernel", compiled, timed)
    level = next((number for number, lack in enumerate(lacks) if lack), len(lacks))
    return Maturity(spec.name, arch, level, lacks[level] if level < len(lacks) else "", compiled, timed)


def _unchecked(lines: list[Mapping[str, Any]], where: str) -> str:
    own = [line for line in lines if line["where"] == where]
    for dtype in DTYPES:
        if not any(line["dtype"] == dtype for line in own):
            return f"not checked with {dtype} inputs {_place(where)}"
    wrong = next((line for line in own if line["failures"]), None)
    return f"wrong {_place(where)}: {wrong['failures'][0]}" if wrong else ""


def _place(where: str) -> str:
    return f"in the {where}" if where == "interpreter" else f"on {where}"


def _uncompiled(lines: tuple[Mapping[str, Any], ...]) -> str:
    if not lines:
        return "not compiled"
    faulty = next((line for line in lines if line["faults"]), None)
    return f"{faulty['what']}: {faulty['faults'][0]}" if faulty else ""


def _untimed(op: str, lines: tuple[Mapping[str, Any], ...]) -> str:
    missing = [step for step in ("decode", "prefill") if not any(line["shape"].startswith(step) for line in lines)]
    if missing:
        return f"not timed in {missing[0]}"
    for line in lines:
        least = target(op, line["shape"])
        bound = line["floors"]["measured"]["term"]
        share = line["share_of_floor"]["measured"]
        if bound != "launch" and share < least:
            return f"{line['shape']}: {share:.0%} of the floor, {least:.0%} asked"
    return ""


def target(op: str, shape: str) -> float:
    """The share of the floor that level 4 asks for."""
    return TARGETS.get(op, OTHERS)[shape.startswith("prefill")]
