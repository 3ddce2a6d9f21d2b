"""The pictures of a trade-off report: the frontier of every method, bars by category, distributions of
scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.frontiers import FALL, FAMILIES, OTHERS, OURS, PLAIN, RISE, Setting, representatives
from calibration.report_figures import Label, Picture, Theme, arms, picture, place_labels

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from calibration.evaluate import Rate

LINEAR = 0.1  # points of WER around 0 that are drawn in proportion; beyond, the axis is logarithmic
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
EDGE = 1e-4  # probabilities closer to 0 or 1 are drawn there


def frontier(settings: Sequence[Setting], *, title: str) -> Picture:
    """WER change across (points, proportional within 0.1, then logarithmic), text-FPR up (percent), a line
    through each method's strengths; ours thick and in the accent colour, the others by family. The corner
    of the targets is shaded. One label per method at its best setting within a point of WER."""
    return picture(lambda figure, theme: _frontier(figure, theme, settings, title), (10.5, 6.6))


def _colours(theme: Theme) -> dict[str, str]:
    names = [name for name in FAMILIES if name != "ours"]
    return {
        "ours": theme.accent,
        OTHERS: theme.families[-1],
        **{name: theme.families[place % len(theme.families)] for place, name in enumerate(names)},
    }


def _frontier(figure: Figure, theme: Theme, settings: Sequence[Setting], title: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axes = figure.subplots()
    colours = _colours(theme)
    plain = next((one for one in settings if one.method == PLAIN), None)
    by_method: dict[str, list[Setting]] = {}
    for one in settings:
        if one.method != PLAIN:
            by_method.setdefault(one.method, []).append(one)
    rises = [100 * one.rise.value for one in settings]
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.6)
    axes.set_xlim(_padded(min([*rises, 0.0]), -1), _padded(max([*rises, LINEAR]), 1))
    highest = max([100 * one.text_fpr.value for one in settings], default=1.0)
    axes.set_ylim(-0.04 * highest, 1.06 * highest)
    if plain is not None:
        top = 100 * plain.text_fpr.value * (1 - FALL)
        left, low = axes.get_xlim()[0], axes.get_ylim()[0]
        axes.fill_between([left, 100 * RISE], low, top, color=theme.good, alpha=0.2, linewidth=0, zorder=1)
    axes.axvline(0, color=theme.soft, linewidth=0.8, zorder=1)
    used: dict[str, int] = {}
    for method, points in sorted(by_method.items(), key=lambda item: item[1][0].family == "ours"):
        points = sorted(points, key=lambda one: one.strength)
        family = points[0].family
        number = used[family] = used.get(family, -1) + 1
        _curve(axes, points, colours[family], MARKERS[number % len(MARKERS)], method == OURS)
    if plain is not None:
        axes.plot(
            0,
            100 * plain.text_fpr.value,
            marker="*",
            markersize=15,
            color=theme.ink,
            zorder=7,
            linestyle="none",
        )
    for name in (*FAMILIES, OTHERS):
        if any(points[0].family == name for points in by_method.values()):
            axes.plot(
                [], [], color=colours[name], marker="o", linewidth=3 if name == "ours" else 1.5, label=name
            )
    target = f"target: −{100 * FALL:g} % at no more than +{100 * RISE:g} points"
    axes.fill_between([], [], [], color=theme.good, alpha=0.25, label=target)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    axes.set_xlabel("change of word error rate on speech, points (left is better; logarithmic beyond ±0.1)")
    axes.set_ylabel("non-speech clips that came back with words, % (down is better)")
    axes.set_title(title)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_xticks([tick for tick in _ticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.grid(linewidth=0.6, alpha=0.6)
    chosen = representatives(settings)
    if OURS in chosen:  # the strength that is used by default
        spot = (100 * chosen[OURS].rise.value, 100 * chosen[OURS].text_fpr.value)
        axes.plot(
            *spot, "o", markersize=15, fillstyle="none", color=theme.accent, markeredgewidth=1.6, zorder=6
        )
    labels = [
        Label(
            one.name if method == OURS else method,
            100 * one.rise.value,
            100 * one.text_fpr.value,
            colours[one.family],
            method == OURS,
        )
        for method, one in chosen.items()
        if method != PLAIN
    ]
    if plain is not None:
        labels.append(Label("plain Whisper", 0.0, 100 * plain.text_fpr.value, theme.ink, True))
    crowd = [(100 * one.rise.value, 100 * one.text_fpr.value) for one in settings]
    place_labels(axes, labels, crowd, theme.paper)


def _curve(axes: Axes, points: Sequence[Setting], colour: str, marker: str, strong: bool) -> None:
    across = [100 * one.rise.value for one in points]
    up = [100 * one.text_fpr.value for one in points]
    axes.plot(
        across, up, color=colour, linewidth=2.6 if strong else 1.0, alpha=1 if strong else 0.55, zorder=3
    )
    axes.errorbar(
        across, up,
        xerr=arms(across, [(100 * one.rise.lo, 100 * one.rise.hi) for one in points]),
        yerr=arms(up, [(100 * one.text_fpr.lo, 100 * one.text_fpr.hi) for one in points]),
        fmt="none", ecolor=colour, elinewidth=1.4 if strong else 0.7, alpha=0.9 if strong else 0.3,
        zorder=4 if strong else 2,
    )  # fmt: skip
    axes.plot(
        across, up, linestyle="none", marker=marker, markersize=8.5 if strong else 5.5, color=colour,
        markeredgecolor=axes.get_facecolor(), markeredgewidth=0.8, zorder=6 if strong else 5,
    )  # fmt: skip


def _ticks() -> list[float]:
    sizes = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    return [*(-size for size in reversed(sizes)), 0.0, *sizes]


def _padded(value: float, side: int) -> float:
    """A little beyond `value` (points) on an axis that is logarithmic beyond LINEAR."""
    return side * max(abs(value) * 1.6, 1.6 * LINEAR) if value * side > 0 else side * 1.2 * LINEAR


def bars(
    panels: Mapping[str, Mapping[str, Rate]],
    *,
    title: str,
    label: str,
    accented: Sequence[str] = (),
) -> Picture:
    """One panel per category with a bar (percent) and interval per method; rates are fractions. accented:
    methods in the accent colour."""
    names = list(dict.fromkeys(name for rates in panels.values() for name in rates))
    columns = min(3, len(panels)) or 1
    lines = -(-len(panels) // columns)
    size = (3.4 * columns + 1.6, lines * (0.27 * len(names) + 0.75) + 0.7)

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        spots = list(grid.flat)
        for axes, (panel, rates) in zip(spots, panels.items(), strict=False):
            values = [100 * rates[name].value if name in rates else math.nan for name in names]
            spans = [
                (100 * rates[name].lo, 100 * rates[name].hi) if name in rates else (0.0, 0.0)
                for name in names
            ]
            colours = [
                theme.accent if name in accented else theme.ink if name == PLAIN else theme.soft
                for name in names
            ]
            places = range(len(names))
            axes.barh(places, values, color=colours, alpha=0.85, height=0.68)
            axes.errorbar(
                values, places, xerr=arms([0 if math.isnan(value) else value for value in values], spans),
                fmt="none", ecolor=theme.families[0], elinewidth=1.2, capsize=2,
            )  # fmt: skip
            for place, (value, (_, high)) in enumerate(zip(values, spans, strict=True)):
                if not math.isnan(value):  # beside the bar's interval; a bar of 0 would not be seen
                    axes.annotate(
                        f"{value:.1f}", (max(value, high), place), xytext=(3, 0), textcoords="offset points",
                        va="center", fontsize=7.5, color=theme.soft,
                    )  # fmt: skip
            axes.set_title(panel)
            axes.set_yticks(places, names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(axis="x", linewidth=0.6, alpha=0.6)
            axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
            axes.tick_params(axis="x", labelbottom=True)
        highest = max([100 * rate.hi for rates in panels.values() for rate in rates.values()], default=1.0)
        spots[0].set_xlim(0, max(highest, 1.0) * 1.12)
        for axes in spots[len(panels) :]:
            axes.set_visible(False)
        for axes in spots[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel(label)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)

    return picture(draw, size)


def distributions(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray, Mapping[str, float]]], *, title: str
) -> Picture:
    """One panel per score: histograms of probabilities (0..1) of speech and of non-speech clips on a logit
    axis.

    panels: name -> (speech (n,), non-speech (m,), marks: words -> probability at which a line stands).
    """
    import numpy as np

    edges = np.linspace(_logit(EDGE), _logit(1 - EDGE), 41)
    ticks = (1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)

    def draw(figure: Figure, theme: Theme) -> None:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, (speech, silent, marks)) in zip(row, panels.items(), strict=True):
            for values, colour, words in (
                (speech, theme.families[1], "speech"),
                (silent, theme.families[0], "non-speech"),
            ):
                if not len(values):
                    continue
                logits = np.log(np.clip(values, EDGE, 1 - EDGE)) - np.log1p(-np.clip(values, EDGE, 1 - EDGE))
                weights = np.full(len(values), 100 / len(values))
                axes.hist(
                    logits, bins=edges, weights=weights, color=colour, alpha=0.55,
                    label=f"{words} ({len(values)} clips)",
                )  # fmt: skip
                axes.hist(logits, bins=edges, weights=weights, color=colour, histtype="step", linewidth=1.3)
            for place, (words, value) in enumerate(marks.items()):
                spot = _logit(min(max(value, EDGE), 1 - EDGE))
                axes.axvline(spot, color=theme.ink, linewidth=1, linestyle=("--", ":")[place % 2])
                axes.annotate(
                    words, (spot, 0.97 - 0.09 * place), xycoords=("data", "axes fraction"), xytext=(4, 0),
                    textcoords="offset points", va="top", fontsize=8.5,
                    bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
                )  # fmt: skip
            axes.set_xticks([_logit(tick) for tick in ticks], [f"{tick:g}" for tick in ticks], fontsize=8)
            axes.set_title(name)
            axes.grid(linewidth=0.6, alpha=0.6)
        row[0].set_ylabel("share of clips, %")
        handles, names = row[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)

    return picture(draw, (5.4 * max(1, len(panels)), 3.7))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
