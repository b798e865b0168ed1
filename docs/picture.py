"""Draws docs/demo.svg from a real run: `python docs/picture.py FIGURES.json` with what `thalweg demo --json` wrote."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from thalweg.cli.demo import show_figures


def main() -> None:
    console = Console(record=True, width=88, file=io.StringIO())
    console.print("$ make demo")
    show_figures(console, json.loads(Path(sys.argv[1]).read_text()))
    console.save_svg(str(Path(__file__).with_name("demo.svg")), title="thalweg")


if __name__ == "__main__":
    main()
