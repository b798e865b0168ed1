"""Progress bars on stderr where a person watches; nothing where the output is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


def output() -> Console:
    """Standard output: as wide as the terminal, or wide enough for tables where it is piped."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 120)


def bar() -> Progress:
    """A progress display for counted work."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def start_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that starting takes: it is called with what, done and total."""
    with bar() as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield show


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a person; where the output is piped, lines of tab-separated cells under the columns' names."""
    if not sys.stdout.isatty():
        for line in (columns, *rows):
            print("\t".join(line))
        return
    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    output().print(table)
