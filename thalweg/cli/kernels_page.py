"""The kernel report as one page of HTML that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from thalweg.cli.report_page import document
from thalweg.kernels.maturity import LEVELS
from thalweg.kernels.spec import OPS

if TYPE_CHECKING:
    from thalweg.kernels.maturity import Maturity


def page(model: str, found: Sequence[Maturity], lines: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    body = [
        f"<h1>Maturity of the GPU kernels, {escape(model)}</h1>",
        "<p>A level is held by recorded evidence about the present sources, with all levels below it. Where nothing "
        "was measured there is the floor (the least time that bytes, arithmetic or one launch allow) and what others "
        "have published; nothing is projected.</p>",
        _ladder(found),
        "<h2>What each compiled kernel takes</h2>",
        _compiled(found),
        "<h2>Floors, times and what is published</h2>",
        *(_shapes(device, lines) for device in dict.fromkeys(line["device"] for line in lines)),
    ]
    return document(f"thalweg: kernel maturity, {model}", body)


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already, each with its own <td>."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _text(value: object, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(str(value))}</td>' if kind else f"<td>{escape(str(value))}</td>"


def _ladder(found: Sequence[Maturity]) -> str:
    archs = list(dict.fromkeys(one.arch for one in found))
    levels = {(one.op, one.arch): one for one in found}
    rows = []
    for spec in OPS:
        own = [levels[spec.name, arch] for arch in archs]
        cells = [
            f'<td><span class="level l{one.level}" title="{escape(one.why_not)}">{one.level}</span></td>' for one in own
        ]
        rows.append([_text(spec.name), *cells, _text(own[0].why_not, "soft"), _text(spec.computes, "soft")])
    legend = "".join(
        f'<p><span class="level l{number}">{number}</span> {escape(text)}</p>' for number, text in enumerate(LEVELS)
    )
    return _table(["op", *archs, f"what the next level on {archs[0]} lacks", "computes"], rows) + legend


def _compiled(found: Sequence[Maturity]) -> str:
    rows = []
    for one in found:
        for line in one.compiled:
            matrix = " ".join(f"{count} {name}" for name, count in line["matrix"].items()) or "-"
            faults = "; ".join(line["faults"])
            rows.append(
                [
                    _text(line["op"]),
                    _text(line["what"]),
                    _text(line["arch"]),
                    _text(line["warps"], "number"),
                    _text(line["registers"], "number"),
                    _text(line["spill_bytes"], "number"),
                    _text(f"{line['shared_bytes'] / 1024:.1f}", "number"),
                    _text(line["tensor_columns"], "number"),
                    _text(line["blocks_per_multiprocessor"], "number"),
                    _text(matrix),
                    _text(faults or "ok", "fault" if faults else ""),
                ]
            )
    columns = ["op", "launch", "arch", "warps", "registers", "spilled bytes", "shared KiB", "TMEM columns", "blocks/SM"]
    return _table([*columns, "tensor-core instructions", "verdict"], rows)


def _shapes(device: str, lines: Sequence[dict[str, Any]]) -> str:
    own = [line for line in lines if line["device"] == device]
    longest = max(math.log10(line["floor_seconds"] * 1e7) for line in own)
    rows = []
    for line in own:
        width = 100 * max(0.0, math.log10(line["floor_seconds"] * 1e7)) / longest
        rows.append(
            [
                _text(line["op"]),
                _text(line["shape"]),
                f'<td style="width:9rem"><div class="bar" style="width:{width:.0f}%"></div></td>',
                _text(f"{line['floor_seconds'] * 1e6:,.1f} us", "number"),
                _text(line["bound_by"]),
                _text("-" if line["seconds"] is None else f"{line['seconds'] * 1e6:,.1f} us", "number"),
                _text("-" if line["share_of_floor"] is None else f"{line['share_of_floor']:.0%}", "number"),
                _text("; ".join(line["published"]), "soft"),
            ]
        )
    columns = ["op", "shape", "floor, log scale", "floor", "bound by", "measured", "of the floor", "published"]
    opened = " open" if device in ("H200", "B200") else ""
    return f"<details{opened}><summary>{escape(device)}</summary>{_table(columns, rows)}</details>"
