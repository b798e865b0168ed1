"""`thalweg kernels verify`: whether kernels compute what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.kernel_names import Json, Ops, Out, appended, backends_of, facts_of, specs_of
from thalweg.cli.progress import bar, output, print_table
from thalweg.errors import ConfigError, nearest
from thalweg.kernels.maturity import DTYPES

if TYPE_CHECKING:
    from thalweg.kernels.verification import Verdict

TRITON = "triton"


def verify(
    ops: Ops = None,
    kernels: Annotated[
        str | None,
        typer.Option("--kernels", help="reference, deterministic, plain, avx2, avx512 or triton; all usable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: the dtype of inputs.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the inputs.", min=0, max=2**62)] = 0,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Check every op of every backend against the reference in float64, and that rows keep their bits in any company.

    Triton's kernels are checked on the GPU that is there or, with TRITON_INTERPRET=1, in its interpreter. The exit code
    is 1 if anything is wrong.
    """
    import torch

    from thalweg.kernels.cases.checks import check_cases
    from thalweg.kernels.verification import verdicts

    if dtype not in DTYPES:
        raise ConfigError(
            f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}", param="dtype"
        )
    specs = specs_of(ops)
    backends = backends_of(kernels)
    cases = [case for case in check_cases() if case.op in {spec.name for spec in specs}]
    inputs = getattr(torch, dtype)
    device = torch.device("cuda" if any(b.name == TRITON for b in backends) and torch.cuda.is_available() else "cpu")
    with bar() as progress, device:
        task = progress.add_task("verifying", total=len(cases))
        found = verdicts(backends, cases, seed, lambda: progress.advance(task), inputs)
    if out is not None:
        _record(found, seed, out)
    if json_:
        print(json.dumps({"seed": seed, "verdicts": [_verdict_facts(verdict) for verdict in found]}))
    else:
        _print_verdicts(found)
    if any(verdict.failures for verdict in found):
        raise typer.Exit(1)


def _record(found: list[Verdict], seed: int, out: Path) -> None:
    from thalweg.kernels.triton.backend import triton_hashes

    facts = {backend: facts_of(backend) for backend in {verdict.backend for verdict in found}}
    hashes = triton_hashes() if TRITON in facts else {}
    with appended(out) as write:
        for verdict in found:
            sources = {"sources": hashes.get(verdict.op)} if verdict.backend == TRITON else {}
            write(_verdict_facts(verdict) | {"seed": seed} | facts[verdict.backend] | sources)


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "op": verdict.op,
        "backend": verdict.backend,
        "dtype": str(verdict.dtype).removeprefix("torch."),
        "cases": verdict.cases,
        "tolerance": verdict.tolerance,
        "largest_error": str(verdict.error) if verdict.error == float("inf") else verdict.error,
        "rows_checked": verdict.rows_checked,
        "failures": verdict.failures,
    }


def _print_verdicts(found: list[Verdict]) -> None:
    columns = ["op", "backend", "cases", "largest error", "tolerance", "of it", "rows alone", "verdict"]
    rows = []
    for one in found:
        exact = one.tolerance == 0
        error = ("none" if one.error == 0 else "differs") if exact else f"{one.error:.2g}"
        share = "-" if exact else f"{one.error / one.tolerance:.1%}"
        company = [failure for failure in one.failures if "other bits" in failure]
        alone = "not promised" if not one.rows_checked else "differ" if company else "same bits"
        verdict = "WRONG" if one.failures else "ok"
        tolerance = "exact" if exact else f"{one.tolerance:g}"
        rows.append([one.op, one.backend, str(one.cases), error, tolerance, share, alone, verdict])
    print_table(columns, rows)
    console = output()
    for one in found:
        for failure in one.failures:
            console.print(f"{one.op}, {one.backend}: {failure}", markup=False, soft_wrap=True)
    wrong = sum(bool(one.failures) for one in found)
    cases = sum(one.cases for one in found)
    console.print(f"{cases:,} results of {len(found)} kernels checked, {wrong} kernels wrong")
