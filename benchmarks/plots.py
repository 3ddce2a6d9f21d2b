"""The picture of a trade-off: hallucination against recognition, one curve per method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LOG_FROM = 5.0  # a WER axis whose largest value is this many times the smallest is logarithmic


@dataclass(frozen=True)
class Point:
    """One setting: alpha, and (value, lower, upper) of text-FPR and WER as fractions."""

    alpha: float
    text_fpr: tuple[float, float, float]
    wer: tuple[float, float, float]


def frontier(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], path: Path, *, title: str, subtitle: str
) -> None:
    """Writes a PNG with one panel per group of clips, each with a curve per method: text-FPR across, WER up,
    both in percent with their intervals, alpha beside every point.

    Points of one curve at the same place share one label. Raises UsageError if `path` cannot be written.
    """
    # the figure's own canvas: no global state, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if len(panels) == 1 else 7 * len(panels), 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, curves) in zip(row, panels.items(), strict=True):
        _draw(axes, curves)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("text-FPR: non-speech clips that came back with words, %  (left is better)")
    row[0].set_ylabel("word error rate on speech, %  (down is better)")
    row[0].legend(frameon=False, loc="best", title="method (bars: 95 % bootstrap)")
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.94, subtitle, fontsize=9, color="#444444", va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def _draw(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> None:
    """One panel: every method's points in order of alpha, plain Whisper as a star."""
    from matplotlib.ticker import ScalarFormatter

    for number, (method, points) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        across = [100 * point.text_fpr[0] for point in points]
        up = [100 * point.wer[0] for point in points]
        axes.plot(across, up, color=colour, linewidth=1.5, alpha=0.7, zorder=2)
        axes.errorbar(
            across, up,
            xerr=_arms([point.text_fpr for point in points]), yerr=_arms([point.wer for point in points]),
            fmt=marker, color=colour, markersize=7, markeredgecolor="white", elinewidth=1, ecolor=colour,
            capsize=2.5, label=method, zorder=3,
        )  # fmt: skip
        steered = [point for point in points if point.alpha > 0]
        for place, ((x, y), alphas) in enumerate(_shared_places(steered).items()):
            text = "α " + ", ".join(f"{alpha:g}" for alpha in alphas)
            # above and below by turns, so that neighbours do not write over each other
            _label(axes, text, x, y, colour, -15 if place % 2 else 9)
    plain = [point for points in curves.values() for point in points if point.alpha == 0]
    for x, y in _shared_places(plain):
        axes.plot(x, y, marker="*", markersize=13, color="black", linestyle="none", label="plain", zorder=5)
        _label(axes, "plain (α 0)", x, y, "black", -19)
    wers = [100 * point.wer[0] for points in curves.values() for point in points]
    if min(wers) > 0 and max(wers) > LOG_FROM * min(wers):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.margins(x=0.08, y=0.1)
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, text: str, x: float, y: float, colour: str, above: float) -> None:
    axes.annotate(
        text, (x, y), color=colour, fontsize=9, xytext=(7, above), textcoords="offset points", zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5},
    )  # fmt: skip


def _arms(estimates: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Lengths of the two error arms in percent, never negative (rounding may put a bound past the value)."""
    lower = [100 * max(0.0, value - lo) for value, lo, _ in estimates]
    upper = [100 * max(0.0, hi - value) for value, _, hi in estimates]
    return [lower, upper]


def _shared_places(points: Sequence[Point]) -> dict[tuple[float, float], list[float]]:
    """Alphas by place (percent), where places closer than a tenth of a percentage point are one."""
    places: dict[tuple[float, float], list[float]] = {}
    for point in points:
        place = (round(100 * point.text_fpr[0], 1), round(100 * point.wer[0], 1))
        places.setdefault(place, []).append(point.alpha)
    return places
