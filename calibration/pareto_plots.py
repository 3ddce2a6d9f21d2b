"""Pictures of a sweep: error against sparsity, and how many latents live (AudioSAE's figures 1, 8, 9, 10).

One panel per activation and expansion, one curve per layer through its k; means over seeds are joined, every
seed has its point. Layers have a colour of an ordered map, a line style, and their number at the curve's end,
so that none of them is needed alone. Where L0 is not an axis, larger points have a larger k.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calibration.export import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # by expansion
# by layer, so that neighbours differ
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_GAP = 10.0  # points between the layer numbers at the margin
_LEGEND_ROWS = 16
_OVERALL = "L0, L2, FVU: means over domains of equal weight; alive: active in any domain's frames"


@dataclass(frozen=True)
class Quantity:
    """A column of the table as an axis. percent: a share (0..1) shown as 0..100."""

    column: str
    label: str
    percent: bool = False
    log: bool = False

    def of(self, row: Row, prefix: str = "") -> float | None:
        value = row.get(prefix + self.column)
        return None if value is None else float(value) * (100 if self.percent else 1)


L0 = Quantity("l0", "L0: active latents per frame", log=True)
L2 = Quantity("l2", "L2: error norm of unit-norm activations")
FVU = Quantity("fvu", "FVU: fraction of variance unexplained")
ALIVE = Quantity("alive", "alive latents, %", percent=True)

FIGURES = {
    "l2_against_l0": (L0, L2, "Reconstruction error against sparsity"),
    "fvu_against_l0": (L0, FVU, "Unexplained variance against sparsity"),
    "alive_against_l0": (L0, ALIVE, "Alive latents against sparsity"),
    "alive_against_l2": (L2, ALIVE, "Alive latents against reconstruction error"),
}


def draw_all(report: Mapping[str, Any], rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes the figures of FIGURES, and L2 against L0 by domain; returns their paths.

    report: for the model's name and the held-out clips. rows: of `pareto.table_rows`. Figures of which no
    point was measured are left out. Raises FormatError if `out` cannot be written.
    """
    clips = ", ".join(f"{count} {name}" for name, count in (report.get("held_out") or {}).items())
    model = f"{report.get('base_model') or 'unnamed model'}, {report.get('d_model')}-d"
    subtitle = f"{model}, held-out clips: {clips or 'not stated'}"
    written = []
    for name, (x, y, title) in FIGURES.items():
        panels = {panel: (chosen, "") for panel, chosen in _by_size(rows).items()}
        path = out / f"{name}.png"
        if draw(panels, x, y, path, title=title, subtitle=f"{subtitle}\n{_OVERALL}"):
            written.append(path)
    domains = [name for name in report.get("held_out") or {} if any(f"{name}_l0" in row for row in rows)]
    by_domain = {
        f"{domain}: {panel}": (chosen, f"{domain}_")
        for panel, chosen in _by_size(rows).items()
        for domain in domains
    }
    path = out / "l2_against_l0_by_domain.png"
    title = "Reconstruction error against sparsity by domain"
    if draw(by_domain, L0, L2, path, title=title, subtitle=subtitle, columns=len(domains)):
        written.append(path)
    return written


def _by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Panel title -> rows, small expansions first."""
    keys = sorted({(row["activation"], row["expansion"], row["n_latents"]) for row in rows})
    return {
        f"{activation}, {expansion:g}x ({n} latents)": [
            row for row in rows if (row["activation"], row["n_latents"]) == (activation, n)
        ]
        for activation, expansion, n in keys
    }


def draw(
    panels: Mapping[str, tuple[Sequence[Row], str]],
    x: Quantity,
    y: Quantity,
    path: Path,
    *,
    title: str,
    subtitle: str,
    columns: int | None = None,
) -> bool:
    """One PNG; panels: title -> (rows, prefix of the columns). False, and no file, if there is no point."""
    # the figure's own canvas: no global state, no display
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        name: (chosen, prefix)
        for name, (chosen, prefix) in panels.items()
        if any(x.of(row, prefix) is not None and y.of(row, prefix) is not None for row in chosen)
    }
    if not panels:
        return False
    every = [row for chosen, _ in panels.values() for row in chosen]
    layers = sorted({row["layer"] for row in every})
    expansions = sorted({row["expansion"] for row in every})
    # the last quarter of the map is too pale on white
    colours = [colormaps["viridis"](0.77 * i / max(1, len(layers) - 1)) for i in range(len(layers))]
    looks = {layer: (colours[i], STYLES[i % len(STYLES)]) for i, layer in enumerate(layers)}
    sizes = _marker_sizes(every, x)
    columns = min(columns or (len(panels) if len(panels) <= 3 else 2), len(panels))
    lines = -(-len(panels) // columns)
    width, height = 5.2 if columns > 1 else 6.6, max(4.1, 0.165 * len(layers) + 0.3)
    legend_columns = -(-len(layers) // _LEGEND_ROWS)
    figure = Figure(
        figsize=(width * columns + 0.9 + 0.8 * legend_columns, height * lines + 0.9),
        dpi=150,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    spots = list(grid.flat)
    for axes, (name, (chosen, prefix)) in zip(spots, panels.items(), strict=False):
        _scales(axes, x, every)
        for layer in layers:
            for expansion in expansions:
                points = [row for row in chosen if (row["layer"], row["expansion"]) == (layer, expansion)]
                marker = MARKERS[expansions.index(expansion) % len(MARKERS)]
                _curve(axes, _points(points, x, y, prefix), *looks[layer], marker, sizes)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label if axes in grid[:, 0] else "")
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in spots[len(panels) :]:
        axes.remove()
    _legend(figure, looks, sizes, legend_columns)
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10, x=0.01, ha="left")
    figure.canvas.draw()  # places are known only now
    for axes, (chosen, prefix) in zip(spots, panels.values(), strict=False):
        curves = {
            layer: _points([row for row in chosen if row["layer"] == layer], x, y, prefix) for layer in looks
        }
        _number_curves(axes, curves, looks)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
    return True


def _marker_sizes(rows: Sequence[Row], x: Quantity) -> dict[int, float]:
    """k -> size of its points; empty where the axis tells them apart."""
    targets = sorted({row["k"] for row in rows if row["k"]})
    if x is L0 or len(targets) < 2:
        return {}
    return {k: 3.5 + 5.5 * i / (len(targets) - 1) for i, k in enumerate(targets)}


def _legend(
    figure: Figure, looks: Mapping[int, tuple[Any, Any]], sizes: Mapping[int, float], columns: int
) -> None:
    """Right of the panels: layers, and below them k where points have its size."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle=style, linewidth=1.8, label=f"layer {layer}")
        for layer, (colour, style) in looks.items()
    ]
    handles += [
        Line2D([], [], color="#555555", marker="o", linestyle="none", markersize=size, label=f"k {k}")
        for k, size in sizes.items()
    ]
    figure.legend(
        handles=handles, loc="outside right upper", frameon=False, fontsize=9, ncols=columns, handlelength=2.4
    )


def _scales(axes: Axes, x: Quantity, rows: Sequence[Row]) -> None:
    """L0 is logarithmic, with the sweep's k as ticks."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    targets = sorted({row["k"] for row in rows if row["k"]})
    if not x.log:
        return
    axes.set_xscale("log")
    if targets:
        axes.xaxis.set_major_locator(FixedLocator(targets))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _points(
    rows: Sequence[Row], x: Quantity, y: Quantity, prefix: str
) -> dict[Any, list[tuple[float, float]]]:
    """k -> points of its seeds, k ascending; SAEs without a k are points of their own, by L0."""
    points: dict[Any, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: (row["k"] or 0, row["l0"] or 0)):
        across, up = x.of(row, prefix), y.of(row, prefix)
        if across is not None and up is not None and not (x.log and across <= 0):
            points.setdefault(row["k"] or ("l0", row["l0"]), []).append((across, up))
    return points


def _means(points: Mapping[Any, Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    across = [sum(point[0] for point in seeds) / len(seeds) for seeds in points.values()]
    up = [sum(point[1] for point in seeds) / len(seeds) for seeds in points.values()]
    return across, up


def _curve(
    axes: Axes,
    points: Mapping[Any, Sequence[tuple[float, float]]],
    colour: Any,
    style: Any,
    marker: str,
    sizes: Mapping[int, float],
) -> None:
    axes.plot(*_means(points), color=colour, linestyle=style, linewidth=1.5, zorder=2)
    for k, seeds in points.items():
        axes.plot(
            [point[0] for point in seeds], [point[1] for point in seeds],
            color=colour, marker=marker, linestyle="none", markersize=sizes.get(k, 5),
            markeredgecolor="white", markeredgewidth=0.6, zorder=3,
        )  # fmt: skip


def _number_curves(
    axes: Axes,
    curves: Mapping[int, Mapping[Any, Sequence[tuple[float, float]]]],
    looks: Mapping[int, tuple[Any, Any]],
) -> None:
    """The layer's number right of the panel, joined to the end of its curve by a thin line."""
    ends: list[tuple[float, int, tuple[float, float]]] = []  # height as a share of the panel, layer, place
    to_share = axes.transData + axes.transAxes.inverted()
    for layer, points in curves.items():
        across, up = _means(points)
        if across:
            last = max(range(len(across)), key=across.__getitem__)
            place = (across[last], up[last])
            ends.append((float(to_share.transform(place)[1]), layer, place))
    ends.sort()
    gap = _GAP / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    for height, (_, layer, place) in zip(spread([end[0] for end in ends], gap), ends, strict=True):
        axes.annotate(
            str(layer), place, xytext=(1.05, height), textcoords="axes fraction",
            fontsize=8, color=looks[layer][0], va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": looks[layer][0], "linewidth": 0.5, "alpha": 0.5,
                        "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights (0..1) moved apart to at least `gap`, by as little as possible, and back into 0..1
    where they fit; where they do not, evenly over 0..1.
    """
    if gap * (len(heights) - 1) > 1:
        return [index / (len(heights) - 1) for index in range(len(heights))]
    # groups of touching heights around their mean: [sum of heights less their offsets, members]
    groups: list[list[float]] = []
    for index, height in enumerate(heights):
        groups.append([height - index * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + members]
    start = [total / members for total, members in groups for _ in range(int(members))]
    top = 1 - gap * (len(heights) - 1)
    return [min(max(low, 0.0), top) + index * gap for index, low in enumerate(start)]
