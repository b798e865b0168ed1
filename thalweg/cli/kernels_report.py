"""`thalweg kernels report`: how mature every GPU kernel is, from recorded evidence; a table, and a page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.kernel_names import Json
from thalweg.cli.progress import output, print_table
from thalweg.errors import ConfigError
from thalweg.kernels.maturity import LEVELS
from thalweg.kernels.spec import OPS

if TYPE_CHECKING:
    from thalweg.kernels.maturity import Maturity

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout
DEVICES = ("H100", "H200", "B200", "B300")


def report(
    evidence: Annotated[
        Path | None, typer.Option(help="Folder of triton_*.jsonl records; a checkout's benchmarks/results if left out.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="flash, pro, default or the path of a model: whose floors are shown.")
    ] = "flash",
    html: Annotated[Path | None, typer.Option(help="Write the whole report as one page to this file.")] = None,
    json_: Json = False,
) -> None:
    """The level of every op on every architecture, what the next one lacks, and every shape's floor, time and share.

    Levels are held by evidence of the present sources alone: `thalweg kernels verify --out`, `thalweg kernels compile
    --out` and benchmarks/gpu_kernels.py record it.
    """
    from thalweg.kernels.maturity import maturity, read_evidence
    from thalweg.kernels.triton.backend import triton_hashes
    from thalweg.kernels.triton.offline import ARCHITECTURES

    folder = evidence or RESULTS
    if not folder.is_dir():
        raise ConfigError(f"--evidence: there is no folder {folder}", param="evidence")
    records = read_evidence(folder, triton_hashes())
    found = [maturity(spec, arch, records) for spec in OPS for arch in ARCHITECTURES]
    lines = shape_lines(model, found)
    if html is not None:
        from thalweg.cli.kernels_page import page

        html.write_text(page(model, found, lines))
    if json_:
        print(json.dumps({"levels": [asdict(one) for one in found], "shapes": lines}))
        return
    _print(found, lines)


def shape_lines(model: str, found: list[Maturity]) -> list[dict[str, Any]]:
    """For every shape that serving asks for and every device: floor, binding term, time and share where measured, what
    others have published."""
    from thalweg.config.accelerators import accelerator
    from thalweg.config.model_parse import load_model_config
    from thalweg.kernels.cases.serving import serving_cases
    from thalweg.kernels.floors import floor
    from thalweg.kernels.published import published
    from thalweg.kernels.spec import spec_of
    from thalweg.kernels.triton.ceilings import sheet_limits

    timed = {(line["device"], line["op"], line["shape"]): line for one in found for line in one.timed}
    limits = {name: sheet_limits(accelerator(name)) for name in DEVICES}
    lines = []
    for case in serving_cases(load_model_config(model)):
        for name in DEVICES:
            least = floor(spec_of(case.op), case.sizes, limits[name])
            ours = next(
                (line for key, line in timed.items() if name in key[0] and key[1:] == (case.op, case.shape)), None
            )
            lines.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "device": name,
                    "floor_seconds": least.seconds,
                    "bound_by": least.term,
                    "seconds": None if ours is None else min(ours["seconds"].values()),
                    "share_of_floor": None if ours is None else ours["share_of_floor"]["measured"],
                    "published": published(case.op, case.shape, name),
                }
            )
    return lines


def _print(found: list[Maturity], lines: list[dict[str, Any]]) -> None:
    archs = list(dict.fromkeys(one.arch for one in found))
    levels = {(one.op, one.arch): one for one in found}
    rows = []
    for spec in OPS:
        own = [levels[spec.name, arch] for arch in archs]
        rows.append([spec.name, *(str(one.level) for one in own), own[0].why_not])
    print_table(["op", *archs, f"what the next level on {archs[0]} lacks"], rows)
    for number, meaning in enumerate(LEVELS):
        output().print(f"level {number}: {meaning}", markup=False, soft_wrap=True)
    shown = [line for line in lines if line["device"] in ("H200", "B200")]
    cells = [
        [
            line["op"],
            line["shape"],
            line["device"],
            f"{line['floor_seconds'] * 1e6:,.1f} {line['bound_by']}",
            "-" if line["seconds"] is None else f"{line['seconds'] * 1e6:,.1f}",
            "-" if line["share_of_floor"] is None else f"{line['share_of_floor']:.0%}",
            line["published"][0] if line["published"] else "-",
        ]
        for line in shown
    ]
    print_table(["op", "shape", "device", "floor us", "measured us", "of the floor", "published"], cells)
