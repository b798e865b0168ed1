"""Every Triton kernel on the GPU at hand, checked and then timed: `python -m benchmarks.gpu_kernels FOLDER`.

Adds lines to triton_checked.jsonl and triton_timed.jsonl in the folder, which are levels 3 and 4 of `thalweg kernels
report`. Needs torch with CUDA and Triton, nothing else. Lines are written as they come and the most telling shapes are
timed first, so that a run that is cut off loses little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from thalweg.cli.kernel_names import appended, facts_of
from thalweg.config.accelerators import Accelerator, accelerators
from thalweg.config.model_parse import load_model_config
from thalweg.kernels.backends import TRITON, Backend, every_backend
from thalweg.kernels.cases.case import Case
from thalweg.kernels.cases.checks import check_cases
from thalweg.kernels.cases.serving import serving_cases
from thalweg.kernels.floors import Limits
from thalweg.kernels.maturity import CHECKED, DTYPES, TIMED
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.kernels.triton.backend import triton_hashes
from thalweg.kernels.triton.ceilings import measured_limits, sheet_limits
from thalweg.kernels.triton.stopwatch import GraphReplay, PlainLaunch
from thalweg.kernels.triton.timing import record, series
from thalweg.kernels.verification import verdicts

FIRST = ("attention", "index_topk", "experts", "linear", "mix_in")  # what a step's time is made of
PLAIN_LIMIT_SECONDS = 2.0  # plain torch is not timed where one call of ours takes longer than a hundredth of it
Write = Callable[[dict[str, Any]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="flash")
    parser.add_argument("--seconds", type=float, default=480, help="no new measurement begins after so many")
    parser.add_argument("--only", default="", help="only shapes with these words")
    parser.add_argument("--skip-checks", action="store_true")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    device = torch.device("cuda")
    facts = device_facts()
    print(json.dumps(facts))
    backend = next(one for one in every_backend() if one.name == TRITON)
    assert backend.kernels is not None, backend.missing
    hashes = triton_hashes()
    if not given.skip_checks:
        with device, lines(given.folder / f"{CHECKED}.jsonl", facts, hashes) as write:
            checked(backend, write)
    with device, lines(given.folder / f"{TIMED}.jsonl", facts, hashes) as write:
        cases = [case for case in serving_cases(load_model_config(given.model)) if given.only in case.shape]
        timed(cases, backend.kernels, device, write, end)


def device_facts() -> dict[str, Any]:
    """What a time depends on besides the kernel."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return facts_of(TRITON) | {"driver": driver}


@contextmanager
def lines(path: Path, facts: dict[str, Any], hashes: dict[str, str]) -> Iterator[Write]:
    """Takes records of ops and writes each as a line at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appended(path) as write:
        yield lambda line: write(line | {"sources": hashes.get(line["op"])} | facts)


def checked(backend: Backend, write: Write) -> None:
    """Every op with fp32 and bfloat16 inputs against the reference, alone and in company."""
    for dtype in DTYPES:
        for verdict in verdicts((backend,), list(check_cases()), int(time.time()), lambda: None, getattr(torch, dtype)):
            line = {"op": verdict.op, "backend": TRITON, "dtype": dtype, "cases": verdict.cases}
            write(line | {"largest_error": str(verdict.error), "failures": verdict.failures})
            print(f"{verdict.op} {dtype}: {verdict.failures or 'ok'}", flush=True)


def timed(cases: list[Case], kernels: Kernels, device: torch.device, write: Write, end: float) -> None:
    """Each case by plain launches and by a replayed graph, beside plain torch where that ends soon."""
    sheet = sheet_limits(_accelerator())
    limits = (sheet, measured_limits(device, sheet))
    print(limits[1], flush=True)
    rank = {op: number for number, op in enumerate(FIRST)}
    for case in sorted(cases, key=lambda case: rank.get(case.op, len(FIRST))):
        if time.monotonic() > end:
            print(f"not timed, out of time: {case.op}, {case.shape}", flush=True)
            continue
        try:
            line = _timed(case, kernels, device, limits)
        except Exception as error:  # one kernel that fails must not cost the times of the others
            print(f"{case.op}, {case.shape}: {type(error).__name__}: {error}", flush=True)
            continue
        write(line)
        share = line["share_of_floor"]["measured"]
        print(f"{case.op}, {case.shape}: {min(line['seconds'].values()) * 1e6:.1f} us, {share:.0%}", flush=True)
        torch.cuda.empty_cache()


def _timed(case: Case, kernels: Kernels, device: torch.device, limits: tuple[Limits, ...]) -> dict[str, Any]:
    ours = series(case, kernels, (PlainLaunch(device), GraphReplay(device)), torch.bfloat16)
    plain = None
    if ours.best * 100 < PLAIN_LIMIT_SECONDS:
        plain = series(case, reference_kernels(), (PlainLaunch(device),), torch.bfloat16)
    return record(case, ours, plain, limits, "bf16")


def _accelerator() -> Accelerator:
    name = torch.cuda.get_device_name()
    return next(one for known, one in accelerators().items() if known in name)


if __name__ == "__main__":
    main()
