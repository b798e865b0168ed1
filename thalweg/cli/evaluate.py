"""`thalweg eval`: does a served model find what it was given? Against any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.progress import bar, output
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.evaluation.exam import Progress, Score
    from thalweg.evaluation.needles import Exam, Examiner, Spec

app = typer.Typer(help="Ask a served model questions with known answers.", no_args_is_help=True)
_ANSWER_TOKENS = {"multi-value": 64, "copy": 64}
_USUAL_ANSWER_TOKENS = 16
_TEXTS = 8  # contexts of text to choose documents from, where the machine has as much


@app.callback()
def _verbs() -> None:
    """Keeps `needle` a verb of its own while it is the only one."""


@app.command("needle")
def needle(
    url: Annotated[str, typer.Option(help="Where the endpoint listens.")] = "http://127.0.0.1:8000",
    context: Annotated[str, typer.Option(help="Tokens of prompt and answer, such as 65536, 64k or 1m.")] = "64k",
    questions: Annotated[int, typer.Option(min=1, help="How many to ask.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of documents, facts and questions.")] = 0,
    task: Annotated[str, typer.Option(help="single, multi-key, multi-value, keys-only, chain or copy.")] = "single",
    place: Annotated[
        str, typer.Option(help="even: all depths; edges: of window, units, chunks and document.")
    ] = "even",
    distractors: Annotated[int, typer.Option(min=0, help="Facts that nobody asks for, with keys that look alike.")] = 0,
    per_document: Annotated[int | None, typer.Option(min=1, help="Questions that share a document.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most answer tokens; models that think need more.")
    ] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Sent as a chat template option if given.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's model; its first one if left out.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the model's tokenizer.json, to count by.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Hide facts in real text, ask for them, and count the right answers.

    The questions of a document share its prefix, so that they also test the prefix cache. OPENAI_API_KEY is sent.
    """
    from thalweg.config.model_parse import default_model
    from thalweg.evaluation.endpoint import Client
    from thalweg.evaluation.exam import Asking, model_name, run
    from thalweg.evaluation.haystack import library_text
    from thalweg.evaluation.needles import Examiner, Placing, Spec, Task
    from thalweg.text.tokenizer import Tokenizer

    answer_tokens = max_tokens or _ANSWER_TOKENS.get(task, _USUAL_ANSWER_TOKENS)
    spec = Spec(
        _choice(Task, task, "task"), _tokens(context), answer_tokens, _choice(Placing, place, "place"), distractors
    )
    client = Client(url, os.environ.get("OPENAI_API_KEY"))
    how = Asking(model or model_name(client), answer_tokens, thinking)
    counted = Tokenizer.load(tokenizer or default_model())
    examiner = Examiner(counted, library_text(counted, _TEXTS * spec.context, seed))
    begin = time.monotonic()
    with bar() as shown:
        bars = shown.add_task("questions", total=questions), shown.add_task("reading", total=None)

        def report(number: int, score: Score) -> Progress:
            shown.update(bars[0], completed=score.asked, description=f"{score.right}/{score.asked} right")
            return lambda done, total: shown.update(
                bars[1], completed=done, total=total, description=f"reading document {number + 1}"
            )

        score = run(client, how, _exams(examiner, spec, seed, questions, per_document), report)
    asked = {"task": task, "place": place, "context": spec.context, "distractors": distractors, "seed": seed}
    facts = {"model": how.model} | asked | score.fields() | {"seconds": round(time.monotonic() - begin, 1)}
    if json_:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        _print(facts)


def _exams(examiner: Examiner, spec: Spec, seed: int, questions: int, per_document: int | None) -> Iterator[Exam]:
    most = per_document or examiner.per_document(spec)
    for number, first in enumerate(range(0, questions, most)):
        yield examiner.exam(spec, (seed, number), min(most, questions - first))


def _choice(kind: Any, value: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"--{name} {value!r} is none of {', '.join(kind)}", param=name) from None


def _tokens(value: str) -> int:
    """65536, 64k and 1m; k is 1024."""
    match = re.fullmatch(r"(\d{1,9})([kKmM]?)", value)
    if match is None:
        raise ConfigError(f"--context {value!r} is not a number of tokens; write for example 64k", param="context")
    return int(match.group(1)) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match.group(2).lower()]


def _print(facts: dict[str, Any]) -> None:
    """The counts as a table, and the first wrong answers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = output()
    table = Table("count", "right", "of", title=f"{facts['task']} needles, {facts['model']}", box=SIMPLE_HEAD)
    table.title_justify = "left"
    table.add_row("questions", str(facts["right"]), str(facts["questions"]))
    table.add_row("  exact, nothing else said", str(facts["exact"]), str(facts["questions"]))
    for place, (right, asked) in facts["by_place"].items():
        table.add_row(f"  {place}", str(right), str(asked))
    for remainder, (right, asked) in enumerate(facts["by_alignment"]):
        table.add_row(f"  position = {remainder} mod 4", str(right), str(asked))
    for eighth, (right, asked) in enumerate(facts["by_depth"]):
        if asked:
            table.add_row(f"  depth {eighth}/8 to {eighth + 1}/8", str(right), str(asked))
    console.print(table)
    for wrong in facts["wrong"][:5]:
        console.print(f"{wrong['text']} expected {wrong['expected']}, got {wrong['answer']!r}", markup=False)
    seconds = facts["first_ttft_seconds"]
    later = facts["later_ttft_seconds_median"]
    console.print(
        f"prompts of {_range(facts['prompt_tokens'])} tokens in {facts['documents']} documents; time to first token "
        f"{min(seconds):.2f} to {max(seconds):.2f} s for a new document"
        + ("" if later is None else f", {later:.2f} s (median) for the next questions")
    )
    console.print(f"accuracy {facts['accuracy']:.4f} ({facts['right']}/{facts['questions']})")


def _range(counts: list[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
