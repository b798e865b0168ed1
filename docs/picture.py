"""Draws docs/demo.svg from a real run: `python docs/picture.py FIGURES.json` with what `thalweg demo --json` wrote."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from thalweg.cli.demo import show_answer, show_figures


def main() -> None:
    console = Console(record=True, width=88, file=io.StringIO())
    console.print("$ make demo")
    figures = json.loads(Path(sys.argv[1]).read_text())
    for answer in figures["answers"]:
        show_answer(console, answer["question"], answer["answer"])
    show_figures(console, figures)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="thalweg"), flags=re.DOTALL)  # no web fonts
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    Path(__file__).with_name("demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
