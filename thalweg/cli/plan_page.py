"""The plan as one page of HTML that needs nothing else: verdict, proof, pictures, errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from thalweg.cli.plan_run import accuracy_lines, far_text, origins_text, seconds_text, table_row
from thalweg.cli.report_page import document
from thalweg.planner import charts, curves
from thalweg.planner.platform import gib

if TYPE_CHECKING:
    from thalweg.planner.accuracy import Score
    from thalweg.planner.advice import Advice, Verdict
    from thalweg.planner.serving_rows import Comparison

_STYLE = (
    "figure{margin:1rem 0 1.6rem}figure svg{width:100%;height:auto;max-width:76rem}figcaption{color:var(--soft);"
    "font-size:.9rem;max-width:64rem}.verdict{border-left:.3rem solid var(--bar);padding:.2rem 1rem;margin:1rem 0}"
    ".verdict p{margin:.3rem 0}.wide{overflow-x:auto}td.keep{white-space:nowrap}"
)


def page(advice: Advice, scores: Sequence[Score], comparisons: Sequence[Comparison]) -> str:
    """The whole document."""
    demand = advice.demand
    body = [
        f"<h1>Plan: {escape(demand.name)} on {escape(advice.platform.name)}</h1>",
        f"<p>{demand.requests:,} requests simulated; on average {demand.prompt_tokens:,.0f} prompt and "
        f"{demand.output_tokens:,.0f} output tokens; the longest has {demand.longest_tokens:,}. "
        f"{demand.hit_rate:.0%} of prompt tokens were said before. "
        f"{demand.session_rate:.3g} tasks start per second.</p>",
        _verdict(advice, scores),
        "<h2>Configurations, best first</h2>",
        _ranked(advice),
        _refused(advice),
    ]
    if advice.best is not None:
        body += [_memory(advice.best), *_pictures(advice, advice.best)]
    body += ["<h2>How wrong this may be</h2>", _errors(scores, comparisons)]
    return document(f"thalweg plan: {demand.name} on {advice.platform.name}", body, _STYLE)


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]], keep: int = 0) -> str:
    """Cells of the first column that is not `keep` may break; figures do not."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(
        "<tr>"
        + "".join(f"<td{'' if i == keep else ' class=keep'}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _verdict(advice: Advice, scores: Sequence[Score]) -> str:
    best = advice.best
    if best is None:
        lines = ["<b>Nothing serves this load.</b> The budgets that fail are below."]
    else:
        met = "It meets the objectives." if not best.missed else "Nothing simulated meets the objectives. The best"
        missed = f" misses: {escape('; '.join(best.missed))}." if best.missed else ""
        lines = [
            f"<b>Run {escape(str(best.candidate))}.</b> {met}{missed}",
            f"Limited by {escape(best.bottleneck)}. A rank holds {best.token_capacity:,} tokens; all ranks "
            f"{best.sessions:,} sessions of the median length, {advice.demand.typical_tokens:,} tokens.",
            f"The nearest shipped profile is <code>thalweg serve --profile {escape(advice.demand.profile)}</code>.",
            f"Step prices are {escape(origins_text(best))}.",
            *(escape(note[0].upper() + note[1:]) + "." for note in best.notes),
        ]
    if advice.sure is not None:
        lines.append(f"The best that rests on nothing unclaimed: {escape(str(advice.sure.candidate))}.")
    lines += [f'<span class="soft">{escape(line)}</span>' for line in accuracy_lines(scores)]
    return f'<div class="verdict">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _ranked(advice: Advice) -> str:
    place = f"p{advice.question.objectives.percentile:g}"
    columns = ("", "configuration", f"TTFT {place}", f"TPOT {place}", "met", "tokens/s", "hits", "sessions", "per task",
               "limited by", "far prices")  # fmt: skip
    rows = [(*table_row(i, v), v.bottleneck, far_text(v)) for i, v in enumerate(advice.verdicts, 1)]
    note = (
        '<p class="soft">Simulated by the engine\'s own scheduler and cache. Intervals of the first line are '
        "simulations with all steps at either end of their intervals; those of the others are scaled. Per task: GPU "
        "time at the load's rate, idle time included. Far prices: the share of a step's time that is extrapolated or "
        "taken from the hardware's limits.</p>"
    )
    return _table(columns, rows, keep=1) + note


def _refused(advice: Advice) -> str:
    rows = [(r.what, r.budget, r.missing) for r in advice.refused]
    split = advice.split
    apart = ""
    if split is not None:
        apart = (
            f"<p>Prompts and decodes on separate engines ({escape(split.what)}): first token "
            f"{seconds_text(split.ttft.seconds)}, per token {seconds_text(split.tpot.seconds)}, by closed forms "
            'without queues. <span class="soft">Not simulated, no such engine was measured: not claimed.</span></p>'
        )
    if not rows:
        return apart
    table = _table(("configuration", "budget that fails", "by how much"), rows, keep=2)
    return f"{apart}<details open><summary>{len(rows)} do not serve this load</summary>{table}</details>"


def _memory(best: Verdict) -> str:
    rows = [(name, f"{size:,}", gib(size)) for name, size in best.proof.items()]
    whole = sum(best.proof.values())
    rows.append(("usable memory of a rank", f"{whole:,}", gib(whole)))
    return "<h2>Proof of memory, one rank</h2>" + _table(("", "bytes", ""), rows)


def _pictures(advice: Advice, best: Verdict) -> list[str]:
    platform, chosen, question = advice.platform, best.candidate, advice.question
    contexts = curves.contexts_up_to(platform.model.max_position_embeddings)
    cliff = curves.capacity_cliff(platform, chosen, question.host_memory, question.disk_space)
    knees = "; ".join(f"{name} " + _knee(load, cliff.capacity_tokens) for name, load in cliff.knee.items())
    return [
        _figure("Time to the first token", charts.surface(contexts, curves.ttft_surface(platform, chosen),
                curves.gaps(platform)), "One request alone on the recommended layout. A hit that ends anywhere "
                "computes some cached tokens again to rebuild its window state: how many, on average, is above each "
                "panel. The boundary policy has no such gap where prompts go on from an earlier end, and that of its "
                "interval elsewhere."),
        _figure("Where the cache is full", charts.cliff(cliff), "Simulated: sessions of "
                f"{charts.short(cliff.session_tokens)} tokens that take turns with pauses of 10 s on one rank, whose "
                "memories are all cut to what 16 of them take; turns after the first. Knee (the "
                f"hit rate falls by a tenth beyond it), in tokens of the whole rank: {knees}."),
        _figure("What a session's bytes are", charts.ledger(*curves.ledger(platform, chosen)), "Rows, live window and "
                "compressor state, and its share of checkpoints, in the pools' blocks; dashed: the pages that vLLM "
                "takes for one running request of a whole step."),
        _figure("Where a step's time goes", charts.steps(curves.step_parts(platform, chosen)), "Predicted parts, one "
                "after the other, and what the hardware's peaks allow. A flag says that a decode gets faster as its "
                "context grows: another kernel path, or rows that contradict each other. "
                "Over 100%: the tables' rows beat this simple form of the limit."),
        _figure("Rates of decoding", charts.pareto(curves.pareto(platform, chosen)), "Best layouts and batches that "
                "memory holds, decodes alone. More than 16 decodes at once were measured nowhere: not claimed."),
        _figure("Which layout when", charts.crossover(*curves.crossover(platform, chosen, advice.demand.hit_rate)),
                f"All GPUs; the layout that serves so many equal requests soonest, {advice.demand.hit_rate:.0%} of "
                "each prompt cached, 500 tokens of output. Closed forms."),
        _policies(advice, best),
    ]  # fmt: skip


def _knee(load: float | None, capacity_tokens: int) -> str:
    return "none up to here" if load is None else f"{load * capacity_tokens:,.0f}"


def _figure(title: str, svg: str, text: str) -> str:
    return f"<h2>{escape(title)}</h2><figure>{svg}<figcaption>{escape(text)}</figcaption></figure>"


def _policies(advice: Advice, best: Verdict) -> str:
    rows = []
    tokens = max(advice.demand.typical_tokens, 4096)
    for cost in curves.policy_costs(advice, best.candidate, tokens):
        even = "-" if cost.policy == "recompute" else f"{cost.break_even:.2g}"
        rows.append((cost.policy, gib(cost.checkpoint_bytes), seconds_text(cost.hit_seconds), even))
    columns = (
        "window policy",
        "checkpoints of a session",
        "a hit takes longer by",
        "pays from so many hits in ten minutes",
    )
    text = (
        f'<p class="soft">A session of {tokens:,} tokens. Its rows and checkpoints are charged the rank\'s time in '
        "proportion to the pools' bytes that they hold for ten minutes, against computing the prompt again. Recompute "
        "keeps nothing. boundary/0 goes on where an earlier prompt or answer ended.</p>"
    )
    return "<h2>What window policies cost</h2>" + _table(columns, rows) + text


def _errors(scores: Sequence[Score], comparisons: Sequence[Comparison]) -> str:
    rows = [
        (s.layer, s.slice, f"{s.count:,}", f"{s.median:.1%}", f"{s.p90:.1%}", f"{s.bias:+.1%}", f"{s.coverage:.0%}")
        for s in scores
    ]
    columns = ("layer", "held out", "n", "median error", "p90", "bias", "80% intervals hold")
    text = _table(columns, rows, keep=1)
    points = [
        (c.where, c.measured, c.estimate.seconds, c.estimate.low, c.estimate.high)
        for c in comparisons
        if c.claimed and c.estimate and c.unit == "s"
    ]
    if points:
        caption = "Published serving figures that the planner claims; docs/planner-accuracy.md has the others, and why."
        text += f"<figure>{charts.errors(points)}<figcaption>{caption}</figcaption></figure>"
    return text
