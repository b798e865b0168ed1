"""`thalweg kernels compile`: Triton's kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.kernel_names import Json, Ops, Out, appended, commit_of_sources, specs_of
from thalweg.cli.progress import bar, output, print_table
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.kernels.triton.offline import Compiled

Arch = Annotated[
    list[str] | None, typer.Option("--arch", help="sm_90a, sm_100a or sm_103a; may be given again. All if left out.")
]
Model = Annotated[str, typer.Option(help="flash, pro, default or the path of a model: whose shapes are compiled.")]


def compile_(
    ops: Ops = None,
    arch: Arch = None,
    model: Model = "flash",
    workers: Annotated[int | None, typer.Option(help="Compilers side by side; one per processor if left out.")] = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Compile every Triton kernel as serving a model launches it, and show what each takes. Needs no GPU.

    A kernel that spills, does not fit or multiplies without tensor cores is a fault; the exit code is then 1.
    """
    from thalweg.config.model_parse import load_model_config
    from thalweg.kernels.triton.backend import compiler_missing, triton_hashes
    from thalweg.kernels.triton.offline import ARCHITECTURES, architecture, compile_all, triton_version

    specs_of(ops)
    wanted = [architecture(name) for name in arch or ARCHITECTURES]
    if missing := compiler_missing():
        raise ConfigError(missing, param="kernels")
    hashes, commit = triton_hashes(), commit_of_sources()
    with bar() as progress:
        task = progress.add_task("compiling", total=None)
        found = compile_all(
            load_model_config(model),
            wanted,
            ops=frozenset(ops) if ops else None,
            workers=workers or os.cpu_count() or 1,
            done=lambda done, total: progress.update(task, completed=done, total=total),
        )
    with appended(out) as write:
        for one in found:
            write(
                asdict(one)
                | {"model": model, "sources": hashes.get(one.op), "triton": triton_version(), "commit": commit}
            )
    if json_:
        print(json.dumps({"model": model, "kernels": [asdict(one) for one in found]}))
    else:
        _print(found)
    if any(one.faults for one in found):
        raise typer.Exit(1)


def _print(found: list[Compiled]) -> None:
    columns = ["op", "launch", "arch", "warps", "registers", "spilled", "shared KiB", "TMEM", "blocks/SM"]
    rows = [
        [
            one.op,
            one.what,
            one.arch,
            str(one.warps),
            str(one.registers),
            str(one.spill_bytes),
            f"{one.shared_bytes / 1024:.1f}",
            str(one.tensor_columns),
            str(one.blocks_per_multiprocessor),
            _counted(one.matrix),
            _counted(one.copies),
            f"{one.seconds:.1f}",
            "; ".join(one.faults) or "ok",
        ]
        for one in found
    ]
    print_table([*columns, "tensor cores", "async copies", "seconds", "verdict"], rows)
    faulty = sum(bool(one.faults) for one in found)
    output().print(f"{len(found)} kernels compiled, {faulty} with faults", soft_wrap=True)


def _counted(instructions: object) -> str:
    assert isinstance(instructions, dict)
    return " ".join(f"{count} {name}" for name, count in instructions.items()) or "-"
