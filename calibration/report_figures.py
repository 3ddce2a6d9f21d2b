"""Figures for reports: the same drawing in a light and in a dark dress, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. accent: what the eye should go to; good: the wished-for region; families: curves
    of several kinds, told apart by colour-blind readers too (after Okabe and Ito)."""

    ink: str
    soft: str
    paper: str
    line: str
    accent: str
    good: str
    families: tuple[str, ...]


LIGHT = Theme(
    "#1b1d21", "#5c626b", "#ffffff", "#d5d9de", "#0060b8", "#167a4b",
    ("#c2500a", "#007a5a", "#a8568c", "#8a6d00", "#5c626b"),
)  # fmt: skip
DARK = Theme(
    "#e7e9ec", "#a2a9b3", "#1d2024", "#3a4048", "#6cb6f2", "#5cc796",
    ("#f0955a", "#3fc79b", "#dd9ac4", "#d9bd4a", "#a2a9b3"),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """PNG files of one drawing for light and dark pages."""

    light: bytes
    dark: bytes


def picture(draw: Callable[[Figure, Theme], None], size: tuple[float, float]) -> Picture:
    """`draw` puts its axes on a figure of `size` inches, once for each theme."""
    light, dark = (_png(draw, size, theme) for theme in (LIGHT, DARK))
    return Picture(light, dark)


def _png(draw: Callable[[Figure, Theme], None], size: tuple[float, float], theme: Theme) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the figure's own canvas: no display
    from matplotlib.figure import Figure
    from PIL import Image

    settings: Any = {  # any: matplotlib's stub wants a literal type for every key
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.line,
        "xtick.color": theme.line, "ytick.color": theme.line, "grid.color": theme.line,
        "xtick.labelcolor": theme.soft, "ytick.labelcolor": theme.soft,
        "axes.facecolor": theme.paper, "figure.facecolor": theme.paper, "legend.labelcolor": theme.ink,
        "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    # 256 colours are enough for a drawing and a third of the size
    reduced = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def arms(values: Sequence[float], spans: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Lengths of the two error arms, never negative (rounding may put a bound past the value)."""
    return [
        [max(0.0, value - low) for value, (low, _) in zip(values, spans, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, spans, strict=True)],
    ]


@dataclass(frozen=True)
class Label:
    """Words to stand beside a point (data coordinates)."""

    words: str
    x: float
    y: float
    colour: str
    strong: bool = False


# places beside a point, in units of the label's own size and a gap: right, left, above, below, diagonals
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
_REACH = (6.0, 14.0, 26.0, 42.0, 62.0)  # gaps in points that are tried


def place_labels(
    axes: Axes, labels: Iterable[Label], avoid: Sequence[tuple[float, float]], paper: str, size: float = 8.5
) -> None:
    """Puts every label near its point where it covers no other label and few of the points `avoid`, with a
    fine line to points that are not next to it; strong ones choose first.

    The figure's layout must be settled: its limits and scales must not change afterwards.
    """
    canvas = axes.figure.canvas
    canvas.draw()
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    crowd: Any = axes.transData.transform(list(avoid)) if len(avoid) else []
    taken: list[tuple[float, float, float, float]] = []
    for label in sorted(labels, key=lambda one: not one.strong):
        weight = "bold" if label.strong else "normal"
        note = axes.annotate(
            label.words, (label.x, label.y), xytext=(0, 0), textcoords="offset points", color=label.colour,
            fontsize=size, fontweight=weight, ha="center", va="center", zorder=8,
            bbox={"facecolor": paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )  # fmt: skip
        note.set_in_layout(False)  # or the axes would make room for it and move
        box = note.get_window_extent()
        half = (box.width / 2 + 2, box.height / 2 + 1)
        at = axes.transData.transform((label.x, label.y))
        best: tuple[float, float, float] | None = None
        for reach in _REACH:
            for across, up in _DIRECTIONS:
                shift = (across * (half[0] + reach * scale), up * (half[1] + reach * scale * 0.7))
                centre = (at[0] + shift[0], at[1] + shift[1])
                around = (centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1])
                cost = reach / 10 + 40 * sum(_overlap(around, other) for other in taken)
                cost += 3 * sum(_within(around, point) for point in crowd)
                beside = around[0] < frame.x0 or around[2] > frame.x1
                cost += 100 * (beside or around[1] < frame.y0 or around[3] > frame.y1)
                if best is None or cost < best[0]:
                    best = (cost, shift[0] / scale, shift[1] / scale)
        _, right, above = best or (0.0, 0.0, 0.0)
        note.set_position((right, above))
        centre = (at[0] + right * scale, at[1] + above * scale)
        taken.append((centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1]))
        near = max(abs(right) * scale - half[0], abs(above) * scale - half[1]) < 9 * scale
        if not near:
            line = axes.annotate(
                "", (label.x, label.y), xytext=(right, above), textcoords="offset points", zorder=7,
                arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "alpha": 0.7},
            )  # fmt: skip
            line.set_in_layout(False)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _within(box: tuple[float, float, float, float], point: Sequence[float]) -> bool:
    return bool(box[0] < point[0] < box[2] and box[1] < point[1] < box[3])
