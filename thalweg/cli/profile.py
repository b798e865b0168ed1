"""`thalweg profile URL`: measures any OpenAI-compatible endpoint; `show` prints a profile, `diff` compares two."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.progress import bar, output
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.profiler.profile import Profile

_MEASURE = "measure"


app = typer.Typer(help="Measure an endpoint: `thalweg profile URL`; or look at profiles.", no_args_is_help=True)
_ANY_LENGTH = 1 << 20
_VERBS = (_MEASURE, "show", "diff")

Lengths = Annotated[str | None, typer.Option(show_default=False, help="Such as 1k,8k,64k.")]


def own_arguments(arguments: list[str]) -> list[str]:
    """What follows `profile`: the verb `measure` is put before an address or an option."""
    implied = bool(arguments) and arguments[0] not in (*_VERBS, "--help")
    return [_MEASURE, *arguments] if implied else arguments


@app.command(_MEASURE)
def profile(
    url: Annotated[str, typer.Argument(help="Where the endpoint listens, such as http://127.0.0.1:8000.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of samples and profile; profile-HOST if left out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid, two to three minutes.")] = False,
    budget: Annotated[
        str | None, typer.Option(show_default=False, help="Time it may take, such as 90s or 30m (usual: 30m).")
    ] = None,
    contexts: Lengths = None,
    batches: Annotated[str | None, typer.Option(show_default=False, help="Sizes of decode batches: 1,2,4,8.")] = None,
    max_context: Annotated[str | None, typer.Option(show_default=False, help="Longest prompt: 64k at most.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, show_default=False, help="Times of each cell.")] = None,
    fill: Annotated[
        str | None, typer.Option(show_default=False, help="Most tokens sent to fill the cache: 2m; 0 leaves it out.")
    ] = None,
    fill_lengths: Annotated[
        str | None, typer.Option(show_default=False, help="Lengths of the prompts that fill the cache: 1k,8k.")
    ] = None,
    ttft_limit: Annotated[float, typer.Option(help="Objective for the time to first token, in seconds.")] = 5.0,
    tpot_limit: Annotated[float, typer.Option(help="Objective for the time per output token, in seconds.")] = 0.02,
    stages: Annotated[
        str | None, typer.Option(show_default=False, help="Some of surfaces,cache,checks,company,load.")
    ] = None,
    holdout: Annotated[
        bool, typer.Option("--holdout/--no-holdout", help="Also measure cells that predictions are tested with.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of texts and arrivals.")] = 0,
    model: Annotated[str | None, typer.Option(help="The endpoint's model; its first one if left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the samples that are there.")] = False,
) -> None:
    """Measure any OpenAI-compatible endpoint from outside, and write profile.json.

    Every sample is kept in samples.jsonl; the same command goes on where it was stopped. OPENAI_API_KEY is sent.
    """
    from thalweg.profiler.plan import usual_plan

    changes = {
        "budget_seconds": _seconds(budget),
        "contexts": _lengths(contexts, "contexts"),
        "batches": _lengths(batches, "batches"),
        "samples": samples,
        "most_fill_tokens": _length(fill, "fill"),
        "fill_tokens": _lengths(fill_lengths, "fill-lengths"),
        "ttft_limit": ttft_limit,
        "tpot_limit": tpot_limit,
        "stages": None if stages is None else tuple(stages.split(",")),
        "holdout": holdout,
        "seed": seed,
    }
    longest = _length(max_context, "max-context")
    folder = out or Path("profile-" + re.sub(r"\W+", "-", url.split("://")[-1]).strip("-"))
    usual_plan(longest or _ANY_LENGTH, quick=quick, **changes)  # what is wrong with flags is said before all else
    _measure(url, folder, lambda n: usual_plan(min(n, longest or n), quick=quick, **changes), model, fresh=fresh)


def _measure(url: str, folder: Path, planned: Callable[[int], Any], model: str | None, *, fresh: bool) -> None:
    """Run it with a bar of the time used, and print what was found."""
    from thalweg.profiler.client import Client
    from thalweg.profiler.measure import PROFILE, measure

    with bar() as progress:
        task = progress.add_task("asking who is there", total=1000)

        def report(key: str, share: float) -> None:
            progress.update(task, description=key, completed=min(1000, round(1000 * share)))

        async def run() -> Profile:
            client = Client(url, os.environ.get("OPENAI_API_KEY"))
            try:
                return await measure(client, planned, folder, report, model=model, fresh=fresh)
            finally:
                await client.close()

        try:
            found = asyncio.run(run())
        except KeyboardInterrupt:
            raise ConfigError(f"stopped; the same command goes on with the samples in {folder}") from None
    _show(found)
    output().print(f"{folder / PROFILE}", markup=False)


@app.command("show")
def show(file: Annotated[Path, typer.Argument(help="A profile.json.")]) -> None:
    """Print the tables of a profile."""
    from thalweg.profiler.profile import Profile

    _show(Profile.load(file))


@app.command("diff")
def diff(
    before: Annotated[Path, typer.Argument(help="A profile.json.")],
    after: Annotated[Path, typer.Argument(help="Another one, of the same model.")],
) -> None:
    """Compare two profiles cell by cell: what became faster or slower, what is kept and answered."""
    from thalweg.cli.profile_tables import differences
    from thalweg.profiler.profile import Profile

    for table in differences(Profile.load(before), Profile.load(after)):
        table.print()


def _show(found: Profile) -> None:
    from thalweg.cli.profile_tables import tables

    for table in tables(found):
        table.print()


def _length(value: str | None, name: str) -> int | None:
    """65536, 64k and 1m; k is 1024."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9})([kKmM]?)", value.strip())
    if match is None:
        raise ConfigError(f"--{name} {value!r} is not a number; write for example 64k", param=name)
    return int(match.group(1)) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match.group(2).lower()]


def _lengths(value: str | None, name: str) -> tuple[int, ...] | None:
    return None if value is None else tuple(_length(part, name) or 0 for part in value.split(","))


def _seconds(value: str | None) -> float | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.strip())
    if match is None or not float(match.group(1)):
        raise ConfigError(f"--budget {value!r} is not a time; write for example 90s or 30m", param="budget")
    return float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[match.group(2)]
