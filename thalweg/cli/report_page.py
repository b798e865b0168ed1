"""The frame of the pages that reports write: one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page. `body` is HTML already; `style` is what this page needs beside the style of all."""
    common = (resources.files("thalweg") / "data" / "report.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{common}{style}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
