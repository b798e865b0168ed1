"""Tables of profiles, and of what two of them have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from thalweg.cli.progress import output, print_table
from thalweg.profiler.profile import Load, Profile, TpotCell, TtftCell, errors_of
from thalweg.profiler.surface import Estimate, Point, Tag

# After a value: how it was come by.
_MARKS = {Tag.MEASURED: "", Tag.INTERPOLATED: " ~", Tag.EXTRAPOLATED: " >", Tag.BOUND: " ≥"}
_SAME = 0.06  # cells of two profiles are the same where their contexts differ by less


@dataclass(frozen=True, slots=True)
class Shown:
    """A titled table."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def print(self) -> None:
        if not self.rows:
            return
        output().print(f"\n{self.title}", markup=False)
        print_table(self.columns, self.rows)


def tables(profile: Profile) -> Iterator[Shown]:
    """Everything that a profile says, with how sure it is."""
    yield _endpoint(profile)
    marks = "~ interpolated, > extrapolated, ≥ bound; 4 of 5 single requests in brackets"
    yield _surface(
        f"time to first token by prompt tokens and reused share ({marks})", profile.surface["ttft"], "{:.0%}"
    )
    yield _surface("time per output token by prompt tokens and batch", profile.surface["tpot"], "batch {:g}")
    yield _cache(profile)
    yield _company(profile)
    yield _loads(profile)
    yield _checks(profile)
    yield _accuracy(profile)
    left_out = Shown("left out", ["what", "why"])
    left_out.rows.extend([list(line.split(": ", 1)) for line in profile.left_out])
    yield left_out


def _endpoint(profile: Profile) -> Shown:
    facts = profile.endpoint
    table = Shown(f"profile of {facts.model} at {facts.url}", ["fact", "value"])
    table.rows.extend(
        [
            ["measured", f"{profile.created}, {profile.seconds:,.0f} s, thalweg {profile.thalweg}"],
            ["server", " ".join(filter(None, (facts.server, facts.version))) or "does not say"],
            ["longest prompt and answer", _tokens(facts.max_model_len)],
            ["asked through", facts.api],
            *(["note", note] for note in facts.notes),
            ["warm-up", profile.warm_up],
        ]
    )
    return table


def _surface(title: str, points: tuple[Point, ...], column: str) -> Shown:
    """One line per context, one column per row of the surface. All rows have the same contexts, or nearly."""
    rows = sorted({point.y for point in points})
    table = Shown(title, ["tokens", *(column.format(row) for row in rows)])
    for line in zip(*([point for point in points if point.y == row] for row in rows), strict=True):
        least, most = min(point.x for point in line), max(point.x for point in line)
        label = f"{least:,.0f}" if most < least * (1 + _SAME) else f"{least:,.0f} to {most:,.0f}"
        table.rows.append([label, *(_estimate(point.estimate) for point in line)])
    return table


def _cache(profile: Profile) -> Shown:
    cache = profile.cache
    table = Shown("prefix cache", ["fact", "value"])
    capacity, request = profile.capacity_tokens(), cache.request_tokens
    stated = profile.endpoint.stated_capacity_tokens
    table.rows.extend(
        [
            ["serves repeated prompts", "yes" if cache.enabled else "not seen"],
            ["in steps of", _tokens(cache.unit_tokens)],
            ["at most behind the shared prefix", _tokens(cache.lag_tokens)],
            ["shortest prompt that hits", _tokens(cache.shortest_hit_tokens)],
            ["keeps", "not told" if capacity is None else _amount(capacity)],
            ["each prompt takes beside its tokens", "not told" if request is None else _amount(request)],
            *([] if cache.most_prompts is None else [["prompts at most", f"{cache.most_prompts.value:,.0f}"]]),
            ["the endpoint says it keeps", _tokens(stated)],
            *(
                [f"idle for {r.age_seconds:.0f} s", f"{r.share:.0%} served"]
                for r in cache.retained
                if not r.other_tokens
            ),
        ]
    )
    return table


def _company(profile: Profile) -> Shown:
    table = Shown("company of one long cold prompt", ["what", "alone", "beside", "ratio"])
    beside, queue = profile.interference, profile.queueing
    if beside is not None:
        for name, alone, company in (
            ("time per output token of a running answer", beside.tpot_alone, beside.tpot_beside),
            (f"first token of {beside.short_tokens:,} tokens", beside.short_ttft_alone, beside.short_ttft_beside),
            (f"first token of {beside.long_tokens:,} tokens", beside.long_ttft_alone, beside.long_ttft_beside),
        ):
            if alone and company:
                one, two = median(alone), median(company)
                table.rows.append([name, _time(one), _time(two), f"{two / one:.2f}"])
    if queue is not None:
        table.rows.append(
            ["two long ones, then a short one", f"{queue.discipline}, longs {queue.long_prompts}", "", ""]
        )
    return table


def _loads(profile: Profile) -> Shown:
    limits = (
        f"first token within {profile.objectives.ttft_seconds:g} s and {profile.objectives.tpot_seconds:g} s a token"
    )
    title = f"load ({limits})"
    columns = ["load", "requests/s", "TTFT p50", "TTFT p90", "TPOT p50", "within both", "goodput/s"]
    table = Shown(title, columns)
    for load in profile.loads:
        table.rows.append(_load(load))
    return table


def _load(load: Load) -> list[str]:
    what = f"{load.concurrency} at a time" if load.kind == "closed" else f"{load.rate:.2f} a second"
    what += f", {load.context_tokens:,} tokens, {load.reuse:.0%} reused, {load.output_tokens} out"
    first = sorted(load.ttft_seconds) or [float("nan")]
    rate = f"{load.requests / load.seconds:.2f}"
    between = median(load.tpot_seconds) if load.tpot_seconds else float("nan")
    p90 = first[min(len(first) - 1, int(0.9 * len(first)))]
    good = f"{load.goodput:.2f}"
    return [what, rate, _time(median(first)), _time(p90), _time(between), f"{load.attainment:.0%}", good]


def _checks(profile: Profile) -> Shown:
    table = Shown("answers cold, from the cache and in company", ["check", "passed", "first failure"])
    for what in sorted({check.what for check in profile.checks}):
        own = [check for check in profile.checks if check.what == what]
        failed = next((check for check in own if not check.passed), None)
        why = (
            "" if failed is None else "not equal" if not failed.equal else f"{failed.expected!r} not in {failed.cold!r}"
        )
        where = "" if failed is None else f"{failed.prompt_tokens:,} tokens: {why}"
        remainders = "/".join(str(r) for r in sorted({check.remainder for check in own}))
        passed = f"{sum(check.passed for check in own)} of {len(own)}"
        table.rows.append([f"{what}, lengths = {remainders} mod 4", passed, where])
    return table


def _accuracy(profile: Profile) -> Shown:
    columns = ["predicted", "cells", "median error", "p90 error", "bias", "samples within the range"]
    table = Shown("predictions of cells that were held out", columns)
    outcomes = profile.outcomes()
    for what, middle, ninety, bias, count in errors_of(outcomes):
        inside = [outcome.inside for outcome in outcomes if outcome.what == what]
        share = sum(inside) / len(inside)
        table.rows.append([what, str(count), f"{middle:.1%}", f"{ninety:.1%}", f"{bias:+.1%}", f"{share:.0%}"])
    return table


def differences(before: Profile, after: Profile) -> Iterator[Shown]:
    """The second profile beside the first."""
    table = Shown("endpoints", ["", "before", "after"])
    for name in ("model", "version", "server", "max_model_len", "api"):
        old, new = getattr(before.endpoint, name), getattr(after.endpoint, name)
        table.rows.append([name, str(old), str(new)])
    yield table
    yield _changed("time to first token", before.ttft_cells, after.ttft_cells)
    yield _changed("time per output token", before.tpot_cells, after.tpot_cells)
    table = Shown("cache and answers", ["", "before", "after"])
    for name in ("unit_tokens", "lag_tokens", "shortest_hit_tokens"):
        table.rows.append([name, _tokens(getattr(before.cache, name)), _tokens(getattr(after.cache, name))])
    kept = [p.capacity_tokens() for p in (before, after)]
    table.rows.append(["keeps", *("not told" if k is None else _amount(k) for k in kept)])
    table.rows.append(
        ["checks passed", *(f"{sum(c.passed for c in p.checks)} of {len(p.checks)}" for p in (before, after))]
    )
    yield table


def _changed(
    title: str,
    before: tuple[TtftCell, ...] | tuple[TpotCell, ...],
    after: tuple[TtftCell, ...] | tuple[TpotCell, ...],
) -> Shown:
    """Cells that both have. A change counts where no sample of one is among those of the other."""
    table = Shown(title, ["cell", "before", "after", "after / before", ""])
    for old in before:
        for new in after:
            if _row(old) != _row(new) or abs(new.context_tokens / old.context_tokens - 1) > _SAME:
                continue
            one, two = old.typical_seconds, new.typical_seconds
            ratio = two / one
            apart = max(new.seconds) < min(old.seconds) or min(new.seconds) > max(old.seconds)
            verdict = ("faster" if ratio < 1 else "slower") if apart else ""
            name = f"{old.context_tokens:,} tokens, {_row(old)}"
            table.rows.append([name, _time(one), _time(two), f"{ratio:.2f}", verdict])
    return table


def _row(cell: TtftCell | TpotCell) -> str:
    return f"{cell.row:.0%} reused" if isinstance(cell, TtftCell) else f"batch {cell.batch}"


def _estimate(estimate: Estimate) -> str:
    high = "…" if estimate.high is None else _time(estimate.high)
    return f"{_time(estimate.value)} [{_time(estimate.low)}, {high}]{_MARKS[estimate.tag]}"


def _amount(estimate: Estimate) -> str:
    if estimate.tag is Tag.BOUND:
        return f"at least {estimate.value:,.0f} tokens"
    return f"{estimate.value:,.0f} tokens [{estimate.low:,.0f}, {estimate.high or estimate.value:,.0f}]"


def _tokens(count: int | None) -> str:
    return "not told" if count is None else f"{count:,} tokens"


def _time(seconds: float) -> str:
    """Three digits, in the unit that fits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
