"""`thalweg plan`: which configuration to run, what it would cost, and how wrong that is."""

from __future__ import annotations

import typer

from thalweg.cli import plan_check, plan_run

_RUN = "run"
_VERBS = (_RUN, "check")

app = typer.Typer(help="Which configuration to run: `thalweg plan --workload ...`.", no_args_is_help=True)
app.command(_RUN)(plan_run.run)
app.command("check")(plan_check.check)


def own_arguments(arguments: list[str]) -> list[str]:
    """What follows `plan`: the verb `run` is put before an option."""
    implied = bool(arguments) and arguments[0] not in (*_VERBS, "--help")
    return [_RUN, *arguments] if implied else arguments
