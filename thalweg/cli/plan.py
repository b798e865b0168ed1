"""`thalweg plan`: what serving a model would cost, and how wrong that is."""

from __future__ import annotations

import typer

from thalweg.cli import plan_check

app = typer.Typer(help="Predict times and memory of serving a V4 model.", no_args_is_help=True)
app.command("check")(plan_check.check)


@app.callback()
def _verbs() -> None:
    """Keeps `check` a verb of its own while it is the only one."""
