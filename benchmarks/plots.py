"""Colours and markers that the benchmarks' pictures share, and labels that keep apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
# offsets (points) at which a label is tried, near ones first, and which of its sides is there
_SPOTS = [
    (x if side == "left" else -x, y, side)
    for reach in range(8)
    for y in ((0,) if reach == 0 else (14 * reach, -14 * reach))
    for x in (7, 40, 80)
    for side in _SIDES
]


def label_apart(
    axes: Axes,
    names: Mapping[tuple[float, float], Sequence[str]],
    *,
    at_once: int = 3,
    points: float = 4.0,
) -> None:
    """Write names beside their points (data coordinates), each where it covers no other name and no point; a
    thin line joins one that found room only farther off, and one that found none is left out. The figure must
    have been drawn.

    at_once: of points whose markers touch, this many names, and how many more there are. points: radius of a
    marker.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    if figure is None or not names:
        return
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    radius = points * figure.dpi / 72
    markers = axes.transData.transform(list(names))
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in markers]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    groups: list[tuple[tuple[float, float], list[tuple[float, float]], list[str]]] = []
    for (place, own), (x, y) in zip(names.items(), markers, strict=True):
        for _, members, said in groups:
            if any(math.hypot(x - a, y - b) < 2 * radius for a, b in members):
                members.append((x, y))
                said += own
                break
        else:
            groups.append((place, [(x, y)], list(own)))
    inside = axes.get_window_extent()
    for place, _, said in groups:
        more = [f"and {len(said) - at_once} more"] if len(said) > at_once else []
        label = axes.annotate(
            "\n".join([*said[:at_once], *more]), place, (7, 0), textcoords="offset points",
            va="center", fontsize=6.5, color="#555555",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#aaaaaa", "shrinkB": points},
        )  # fmt: skip
        label.set_in_layout(False)  # what was drawn keeps its place
        for x, y, side in _SPOTS:
            label.set_position((x, y))
            label.set_horizontalalignment(side)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # of the words alone, without the line
            room = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if room and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            label.remove()
