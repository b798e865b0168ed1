"""The report's pictures: SVG that takes its ink from the page, so that one picture reads in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thalweg.planner.curves import HIT_RATES, Cliff, StepPart
from thalweg.planner.fitting import Array

COLOURS = ("#2f8fd0", "#e08a1e", "#2ba084", "#c868a4", "#d1603a", "#8a86d8", "#a59a1f", "#7f8c99")  # told apart by all
_INK, _LINE, _PAPER = "#010203", "#040506", "#070809"  # stand for the page's own colours
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "thalweg",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
SURFACE = "cividis"


def drawn(width: float, height: float, panels: int, draw: Callable[[list[Axes]], None], *, share: bool = False) -> str:
    """One picture of panels beside each other, in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, sharey=share)[0]
        draw(list(axes))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for mark, name in ((_INK, "ink"), (_LINE, "line"), (_PAPER, "paper")):
        svg = svg.replace(mark, f"var(--{name})")
    return svg


def _contexts(axes: Axes, contexts: Sequence[int], label: str = "context, tokens") -> None:
    axes.set_xscale("log", base=2)
    shown = contexts[:: 2 if len(contexts) > 5 else 1]
    axes.set_xticks(shown, [short(c) for c in shown])
    axes.minorticks_off()
    axes.set_xlabel(label)


def short(tokens: float) -> str:
    """8192 as 8K, 1048576 as 1M."""
    return f"{tokens / 2**20:g}M" if tokens >= 2**20 else f"{tokens / 1024:.0f}K" if tokens >= 1024 else f"{tokens:g}"


def surface(contexts: Sequence[int], panels: dict[str, Array], gaps: dict[str, int]) -> str:
    """First-token times over context and hit rate, with lines of 1, 10 and 60 seconds."""

    def draw(axes: list[Axes]) -> None:
        values = np.log10(np.concatenate([p.ravel() for p in panels.values()]))
        levels = np.linspace(values.min(), values.max(), 15)
        rows = np.arange(len(HIT_RATES))
        for place, (policy, seconds) in zip(axes, panels.items(), strict=True):
            filled = place.contourf(contexts, rows, np.log10(seconds), levels=levels, cmap=SURFACE)
            lines = place.contour(contexts, rows, seconds, levels=[1, 10, 60], colors="#ffffff", linewidths=1.4)
            place.clabel(lines, fmt=lambda s: f"{s:g} s", fontsize=9)
            _contexts(place, contexts)
            place.grid(visible=False)
            place.set_yticks(rows, [f"{h:.1%}".replace(".0%", "%") for h in HIT_RATES])
            place.set_title(f"{policy}: {gaps[policy]:,} tokens again")
        axes[0].set_ylabel("share of the prompt that is cached")
        ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if levels[0] <= t <= levels[-1]]
        bar = axes[0].figure.colorbar(filled, ax=axes, ticks=ticks, label="first token, s")
        bar.ax.set_yticklabels([f"{10.0**t:g}" for t in ticks])

    return drawn(11, 3.6, len(panels), draw, share=True)


def cliff(found: Cliff) -> str:
    """Hit rate and first-token time over sessions, by tiers, the knees marked."""

    def draw(axes: list[Axes]) -> None:
        styles = ("-", "--", ":")
        for i, name in enumerate(found.hit_rates):
            style: dict[str, Any] = {
                "color": COLOURS[i],
                "linestyle": styles[i],
                "marker": "o",
                "markersize": 4,
                "label": name,
            }
            axes[0].plot(found.loads, np.array(found.hit_rates[name]) * 100, **style)
            axes[1].plot(found.loads, found.ttft[name], **style)
            knee = found.knee[name]
            if knee is not None:
                at = found.hit_rates[name][found.loads.index(knee)] * 100
                axes[0].plot(knee, at, "v", color=COLOURS[i], markersize=10)
                axes[0].annotate(
                    f"knee, {knee:.2g}", (knee, at), (6, -14 - 11 * i), textcoords="offset points", fontsize=9
                )
        axes[0].set_ylabel("cached share of later turns, %")
        axes[0].set_ylim(-3, 105)
        axes[1].set_ylabel("first token p90, s")
        axes[1].set_yscale("log")
        for place in axes:
            place.set_xlabel("tokens of all sessions / tokens that the device holds")
        axes[1].legend(loc="best")

    return drawn(11, 3.4, 2, draw)


def ledger(contexts: Sequence[int], groups: dict[str, list[int]], pages: Sequence[int]) -> str:
    """Bytes of a session: by group, and as a share; vLLM's pages as a line."""

    def draw(axes: list[Axes]) -> None:
        sizes = np.array(list(groups.values()), float)
        names = list(groups)
        whole = sizes.sum(axis=0)
        for place, values in ((axes[0], sizes / 2**30), (axes[1], 100 * sizes / whole)):
            place.stackplot(contexts, values, colors=COLOURS[: len(names)], labels=names, alpha=0.9)
            _contexts(place, contexts)
            place.set_xlim(contexts[0], contexts[-1])
        axes[0].plot(contexts, np.array(pages) / 2**30, color=_INK, linestyle="--", label="vLLM's pages")
        axes[0].set_ylabel("of one session, GiB")
        axes[0].set_ylim(0, max(whole.max(), max(pages)) / 2**30 * 1.05)
        axes[1].set_ylabel("share of its bytes, %")
        axes[1].set_ylim(0, 100)
        axes[0].legend(loc="upper left", fontsize=8.5)

    return drawn(11, 3.6, 2, draw)


def steps(found: dict[str, list[StepPart]]) -> str:
    """A step's parts one after the other, each beside the limit of the hardware."""

    def draw(axes: list[Axes]) -> None:
        for place, (name, parts) in zip(axes, found.items(), strict=True):
            begin = 0.0
            end = sum(p.seconds for p in parts) * 1e3
            for i, part in enumerate(parts):
                millis = part.seconds * 1e3
                place.barh(i, millis, left=begin, color=COLOURS[0], height=0.62, label="predicted" if not i else None)
                note = f"{millis:.0f} ms" if millis >= 10 else f"{millis:.2g} ms"
                if part.limit is not None:
                    limit = part.limit * 1e3
                    label = "limit of the hardware" if not i else None
                    place.barh(i, limit, left=begin, color=COLOURS[1], height=0.26, label=label)
                    note += f", {limit / millis:.0%} of it the limit" if millis else ""
                if part.flag:
                    note += f"; {part.flag}"
                right = begin + millis < 0.55 * end
                place.annotate(note, (begin + millis if right else begin, i), (4 if right else -4, 0), fontsize=8.5,
                               textcoords="offset points", va="center", ha="left" if right else "right")  # fmt: skip
                begin += millis
            place.set_yticks(range(len(parts)), [p.name for p in parts])
            place.invert_yaxis()
            place.grid(axis="y", visible=False)
            place.set_xlabel("ms from the begin of the step")
            place.set_title(f"{name} at 128K: {end:.3g} ms")
            if parts[0].limit is not None:
                place.legend(loc="lower left", fontsize=8.5)

    return drawn(12, 4.0, len(found), draw)


def pareto(found: dict[int, list[tuple[float, float, str]]]) -> str:
    """Decode rates: of a user against of a GPU, one line per context."""

    def draw(axes: list[Axes]) -> None:
        for i, (context, points) in enumerate(found.items()):
            users, gpus, _ = zip(*points, strict=True)
            axes[0].plot(users, gpus, marker="o", markersize=4, color=COLOURS[i], label=f"{short(context)} of context")
            for (user, gpu, name), shift in ((points[0], (6, 5)), (points[-1], (6, -3))):
                axes[0].annotate(name, (user, gpu), shift, textcoords="offset points", fontsize=8.5)
        axes[0].set_xlabel("tokens/s of a user")
        axes[0].set_ylabel("tokens/s of a GPU")
        axes[0].set_yscale("log")
        axes[0].legend(loc="best", fontsize=9)

    return drawn(11, 4.2, 1, draw)


def crossover(contexts: Sequence[int], counts: Sequence[int], rows: Sequence[Sequence[str]]) -> str:
    """Which layout is soonest, by context and concurrency."""

    def draw(axes: list[Axes]) -> None:
        names = sorted({name for row in rows for name in row if name})
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        for y, row in enumerate(rows):
            for x, name in enumerate(row):
                fill = colours.get(name, "none")
                axes[0].add_patch(mpl.patches.Rectangle((x, y), 0.96, 0.94, facecolor=fill, alpha=0.85))
                axes[0].text(x + 0.48, y + 0.47, name or "does not fit", ha="center", va="center", fontsize=8.5,
                             color="#0b0f14" if name else _INK)  # fmt: skip
        axes[0].set_xlim(0, len(contexts))
        axes[0].set_ylim(0, len(rows))
        axes[0].set_xticks(np.arange(len(contexts)) + 0.48, [short(c) for c in contexts])
        axes[0].set_yticks(np.arange(len(rows)) + 0.47, [str(c) for c in counts])
        axes[0].set_xlabel("context, tokens")
        axes[0].set_ylabel("requests at once")
        axes[0].grid(visible=False)

    return drawn(11, 3.2, 1, draw)


def errors(points: Sequence[tuple[str, float, float, float, float]]) -> str:
    """Predicted against measured, with 80% intervals: (name, measured, predicted, low, high) in seconds."""

    def draw(axes: list[Axes]) -> None:
        _, measured, predicted, low, high = (np.array(c) for c in zip(*points, strict=True))
        ends = [min(measured.min(), low.min()) * 0.7, max(measured.max(), high.max()) * 1.4]
        axes[0].plot(ends, ends, color=_INK, linewidth=1, linestyle="--", label="right")
        spread = np.maximum(0, [predicted - low, high - predicted])
        axes[0].errorbar(measured, predicted, yerr=spread, fmt="o", color=COLOURS[0], markersize=5, elinewidth=1.2,
                         label="predicted, 80% interval")  # fmt: skip
        axes[0].set(xscale="log", yscale="log", xlabel="measured, s", ylabel="predicted, s", xlim=ends, ylim=ends)
        axes[0].legend(loc="upper left")

    return drawn(11, 4.4, 1, draw)
