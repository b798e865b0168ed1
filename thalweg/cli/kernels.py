"""`thalweg kernels`: which kernels there are, which are chosen and why, whether they are right, and how fast."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli import engine_flags as flags
from thalweg.cli import kernels_compile, kernels_report, kernels_verify
from thalweg.cli.kernel_names import (
    Json,
    Ops,
    appended,
    commit_of_sources,
    model_of,
    specs_of,
)
from thalweg.cli.progress import bar, output, print_table
from thalweg.errors import ConfigError
from thalweg.kernels.spec import OPS, OpSpec

if TYPE_CHECKING:
    from thalweg.kernels.backends import Backend
    from thalweg.kernels.cases.case import Case
    from thalweg.kernels.cpu.ceilings import Ceilings
    from thalweg.kernels.measurement import Contender
    from thalweg.kernels.registry import KernelChoice, KernelSet

app = typer.Typer(help="The kernels: list, explain, verify, bench, compile, report.", no_args_is_help=True)
app.command("verify")(kernels_verify.verify)
app.command("compile")(kernels_compile.compile_)
app.command("report")(kernels_report.report)

Model = Annotated[str, typer.Option("--shape", help="default, race or flash: the model whose shapes are taken.")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every op with the backends that have one of their own, and every backend with why it is missing."""
    from thalweg.kernels.backends import every_backend

    backends = every_backend()
    chosen = {choice.op: choice.backend for choice in _chosen({}).choices}
    own = {backend.name: backend.own_ops() if backend.kernels is not None else () for backend in backends}
    if json_:
        print(json.dumps({"ops": [_op_facts(spec, own, chosen) for spec in OPS], "backends": _facts(backends)}))
        return
    columns = ["op", *own]
    rows = [[s.name, *(_cell(s.name in ops, name == chosen[s.name]) for name, ops in own.items())] for s in OPS]
    print_table(columns, rows)
    print_table(["backend", "usable", "about"], [[b.name, _yes(b.kernels is not None), _about(b)] for b in backends])


def _op_facts(spec: OpSpec, own: dict[str, tuple[str, ...]], chosen: dict[str, str]) -> dict[str, Any]:
    backends = [name for name, ops in own.items() if spec.name in ops]
    return {
        "op": spec.name,
        "computes": spec.computes,
        "tolerance": spec.tolerance,
        "backends": backends,
        "chosen": chosen[spec.name],
    }


def _facts(backends: Sequence[Backend]) -> list[dict[str, Any]]:
    return [
        {
            "backend": backend.name,
            "usable": backend.kernels is not None,
            "why_not": backend.missing or None,
            "rows_keep_their_bits": backend.exact,
        }
        for backend in backends
    ]


def _cell(own: bool, chosen: bool) -> str:
    return "chosen" if chosen else "yes" if own else "-"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _about(backend: Backend) -> str:
    if backend.kernels is None:
        return backend.missing
    if not backend.exact:
        return "plain torch on any device"
    threads = "any number of threads" if backend.any_threads else "a given number of threads"
    return f"a row's bits depend on that row alone, with {threads}"


@app.command("explain")
def explain(
    op: Annotated[str | None, typer.Argument(help="One op, with its costs; all, with the choice, if left out.")] = None,
    config: flags.ConfigFile = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    kernels: flags.KernelBackend = None,
    deterministic: flags.Deterministic = None,
    shape: Model = "default",
    json_: Json = False,
) -> None:
    """Which backend computes an op under these engine flags and why; what the op is, may err and costs."""
    given = {"device": device, "dtype": dtype, "kernels": kernels, "deterministic": deterministic, "config": config}
    (spec,) = specs_of([op]) if op is not None else (None,)
    model = model_of(shape)
    choices = {choice.op: choice for choice in _chosen(given).choices}
    if spec is None:
        _print_choices(choices, json_)
        return
    from thalweg.kernels.cases.workloads import workloads

    cases = [case for case in workloads(model) if case.op == spec.name]
    facts = {
        "op": spec.name,
        "backend": choices[spec.name].backend,
        "why": choices[spec.name].reason,
        "computes": spec.computes,
        "contract": _contract(spec.name),
        "tolerance": spec.tolerance,
    }
    costs = [
        {"shape": c.shape, "sizes": dict(c.sizes), "flops": spec.flops(c.sizes), "bytes": spec.bytes(c.sizes)}
        for c in cases
    ]
    if json_:
        print(json.dumps(facts | {"model": shape, "costs": costs}))
    else:
        _print_explained(facts, costs)


def _print_choices(choices: dict[str, KernelChoice], as_json: bool) -> None:
    columns = ("op", "backend", "why", "computes")
    rows = [(spec.name, choices[spec.name].backend, choices[spec.name].reason, spec.computes) for spec in OPS]
    if as_json:
        print(json.dumps({"ops": [dict(zip(columns, row, strict=True)) for row in rows]}))
    else:
        print_table(columns, rows)


def _print_explained(facts: dict[str, Any], costs: list[dict[str, Any]]) -> None:
    console = output()
    exact = "exact" if facts["tolerance"] == 0 else f"{facts['tolerance']:g} from the float64 result at the most"
    for name, text in (
        (facts["op"], facts["computes"]),
        ("backend", f"{facts['backend']} ({facts['why']})"),
        ("tolerance", exact),
        ("contract", facts["contract"]),
    ):
        console.print(f"{name}: {text}", markup=False, soft_wrap=True)
    rows = [
        [
            cost["shape"],
            f"{cost['flops'] / 1e6:,.3f}",
            f"{cost['bytes'] / 1e6:,.3f}",
            f"{cost['flops'] / cost['bytes']:,.2f}",
            " ".join(f"{name}={value}" for name, value in cost["sizes"].items()),
        ]
        for cost in costs
    ]
    print_table(["shape", "MFLOP", "MB", "FLOP per byte", "sizes"], rows)


def _contract(op: str) -> str:
    """The op's own words in ops.py, on one line."""
    from typing import get_type_hints

    from thalweg.kernels.ops import Kernels

    return " ".join((get_type_hints(Kernels)[op].__doc__ or "").split())


@app.command("bench")
def bench(
    ops: Ops = None,
    shape: Model = "default",
    kernels: flags.KernelBackend = None,
    threads: flags.Threads = None,
    seconds: Annotated[
        float, typer.Option(help="Time of one measurement; the median of its runs counts.", min=0)
    ] = 0.3,
    only: Annotated[str, typer.Option(help="Only shapes with these words, such as `decode 1`.")] = "",
    out: Annotated[Path | None, typer.Option(help="Add one JSON line per op, shape and backend to this file.")] = None,
) -> None:
    """Time ops beside the least that this machine could take, which is measured first, and beside the reference."""
    import torch

    from thalweg.kernels.cases.workloads import workloads

    names = {spec.name for spec in specs_of(ops)}
    cases = [case for case in workloads(model_of(shape)) if case.op in names and only in case.shape]
    if not cases:
        raise ConfigError(f"--only {only!r}: no shape of these ops has these words", param="only")
    kernel_set = _chosen({"device": "cpu", "kernels": kernels, "threads": threads})
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with appended(out) as write:
            records = _measured(cases, kernel_set, seconds, {"model": shape}, write)
    finally:
        torch.set_num_threads(before)
    _print_records(records)


def _measured(
    cases: list[Case],
    kernel_set: KernelSet,
    seconds: float,
    facts: dict[str, Any],
    write: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Records of all cases; each is written before the next case begins."""
    from thalweg.cli.demo import machine_facts
    from thalweg.kernels.measurement import record, timings

    facts |= {"commit": commit_of_sources()} | machine_facts()
    with bar() as progress:
        progress.add_task("measuring the machine", total=None)
        ceilings = _ceilings()
    output().print(_machine(ceilings), soft_wrap=True)
    records: list[dict[str, Any]] = []
    with bar() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op}: {case.shape}")
            found = timings(case, _contenders(case.op, kernel_set), seconds)
            records += [record(timing, ceilings, found[0].median) | facts for timing in found]
            for one in records[-len(found) :]:
                write(one)
            progress.advance(task)
    return records


def _contenders(op: str, kernel_set: KernelSet) -> list[Contender]:
    """The reference first, then the chosen backend where that is another."""
    from thalweg.kernels.measurement import Contender
    from thalweg.kernels.registry import reference_kernels

    chosen = next(choice.backend for choice in kernel_set.choices if choice.op == op)
    reference = Contender("reference", reference_kernels())
    return [reference] if chosen == "reference" else [reference, Contender(chosen, kernel_set.kernels)]


def _ceilings() -> Ceilings:
    """By the highest instruction set, whatever kernels are measured: the machine's limit is no backend's."""
    import torch

    from thalweg.kernels.cpu.ceilings import measured_ceilings
    from thalweg.kernels.cpu.library import LibraryMissing, load_library

    try:
        library = load_library()
    except LibraryMissing:
        library = None
    return measured_ceilings(library, torch.get_num_threads())


def _machine(ceilings: Ceilings) -> str:
    count = f"{ceilings.threads} thread{'' if ceilings.threads == 1 else 's'}"
    sizes = ("256 KiB", "8 MiB", "256 MiB")
    reads = ", ".join(f"{rate / 1e9:,.1f} of {size}" for rate, size in zip(ceilings.reads, sizes, strict=True))
    return (
        f"this machine with {count}, measured by {ceilings.how}: "
        f"{ceilings.flops / 1e9:,.1f} GFLOP/s of fp32 multiply-adds; GB/s read: {reads}"
    )


def _print_records(records: list[dict[str, Any]]) -> None:
    columns = ["op", "shape", "backend", "time", "GFLOP/s", "GB/s", "limit", "times the limit", "over reference"]
    rows = [
        [
            line["op"],
            line["shape"],
            line["backend"],
            _duration(line["seconds"]),
            f"{line['gflops_per_second']:,.1f}",
            f"{line['gbytes_per_second']:,.1f}",
            f"{_duration(line['limit_seconds'])} {line['limited_by']}",
            f"{line['times_the_limit']:,.1f}",
            "-" if line["backend"] == "reference" else f"{line['speedup_over_reference']:,.2f}",
        ]
        for line in records
    ]
    print_table(columns, rows)


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.2f} {unit}"
    return f"{seconds * 1e6:,.2f} us"


def _chosen(given: dict[str, Any]) -> KernelSet:
    """What an engine with these options would compute with."""
    import torch

    from thalweg.kernels.registry import select_kernels

    options = flags.options_from(given)
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return select_kernels(
        torch.device("cuda" if cuda else "cpu"),
        deterministic=options.deterministic,
        compute=torch.bfloat16 if options.dtype == "bfloat16" else torch.float32,
        wanted=options.kernels,
    )
