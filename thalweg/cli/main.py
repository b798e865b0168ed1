"""`thalweg`: one verb per job. Verbs import what they need when they run, so that --help and --version are instant."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from thalweg import __version__
from thalweg.cli import (
    cache,
    demo,
    evaluate,
    generate,
    inspect,
    kernels,
    new_model,
    peers,
    plan,
    profile,
    serve,
    simulate,
)
from thalweg.errors import ThalwegError

app = typer.Typer(
    name="thalweg",
    help="Serve DeepSeek-V4-family models at million-token context.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("new-model")(new_model.new_model)
app.command("demo")(demo.demo)
app.add_typer(evaluate.app, name="eval")
app.add_typer(cache.app, name="cache")
app.add_typer(kernels.app, name="kernels")
app.add_typer(plan.app, name="plan")
app.command("simulate")(simulate.simulate)
app.add_typer(profile.app, name="profile")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"thalweg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _own(arguments: list[str]) -> list[str]:
    """Arguments in our terms, after a word about those that have no effect."""
    if arguments[:1] == ["profile"]:
        return ["profile", *profile.own_arguments(arguments[1:])]
    if arguments[:1] != ["serve"]:
        return arguments
    own, notes = peers.own_arguments(arguments)
    for note in notes:
        print(f"thalweg: {note}", file=sys.stderr)
    return own


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    try:
        app(_own(sys.argv[1:]))
    except ThalwegError as error:
        print(f"thalweg: {error.message}", file=sys.stderr)
        sys.exit(2)
