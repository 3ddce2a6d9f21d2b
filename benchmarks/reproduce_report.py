"""What `benchmarks.reproduce` measured, as a person or a program reads it: tables, rows, pictures, one page.

Every figure stands beside the published one, and every output names the model and the data of both.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from benchmarks.files import write_whole
from benchmarks.plots import COLOURS, MARKERS, label_apart
from benchmarks.published import LIBRISPEECH, VECTOR_SETS, Cell, Condition, Table
from calibration.evaluate import NSP_THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.reproduce import Measured, Reproduction

MEASURES = {
    "nsp_fpr": "FPR %", "hr": "HR %", "text_fpr": "text-FPR %", "tpr": "TPR %", "wer": "WER %", "f1": "F1",
}  # fmt: skip
COLUMNS_AT_ONCE = 4  # of a printed table
BINS = 25  # of a distribution

ROW_KEYS = (
    "table", "title", "source", "method", "vector", "k", "alpha", "where", "set", "measure",
    "published", "published_to", "published_model", "measured", "measured_lo", "measured_hi", "clips",
    "model", "data", "stand_in",
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """measured_on: the model in words; model: its name; data: what each data set's clips are, by its name;
    notes: what was left out."""

    measured_on: str
    model: str
    data: Mapping[str, str]
    stand_in: bool
    notes: tuple[str, ...]

    def lines(self, tables: Sequence[Table]) -> list[str]:
        """What to know before reading a figure."""
        published = dict.fromkeys(f"{table.model} ({table.source})" for table in tables)
        lines = [
            f"published: {', '.join(published)}, on the papers' data sets",
            f"measured: {self.measured_on} on {'; '.join(self.data.values())}",
        ]
        if self.stand_in:
            lines.append("not comparable: * stands in for the data set of that name")
        return [*lines, *(f"note: {note}" for note in self.notes)]


# -- tables


def columns_of(table: Table, result: Reproduction) -> list[tuple[str, str]]:
    """The columns with at least one figure, published or measured."""
    known = {cell[1:] for cell in (*table.figures, *result.cells) if cell[0] in table.rows}
    return [column for column in table.columns if column in known]


def header(column: tuple[str, str], about: About) -> str:
    """ "MUSAN FPR %", or "MUSAN* FPR %" if other clips take its place. column: data set, measure."""
    return f"{column[0]}{'*' * about.stand_in} {MEASURES[column[1]]}"


def published_text(table: Table, cell: Cell) -> str:
    """ "33.0", "24.0-26.0", or "-" where no figure is at hand."""
    if cell not in table.figures:
        return "-"
    low, high = table.figures[cell]
    scale, digits = _scale(cell[2])
    text = f"{scale * low:.{digits}f}"
    return text if low == high else f"{text}-{scale * high:.{digits}f}"


def measured_text(measured: Measured | None, measure: str) -> str:
    """ "4.2 [0.8, 8.3]", or "-" where nothing could be measured."""
    if measured is None or math.isnan(measured.rate.value):
        return "-"
    scale, digits = _scale(measure)
    value, lo, hi = (scale * end for end in (measured.rate.value, measured.rate.lo, measured.rate.hi))
    return f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"


def _scale(measure: str) -> tuple[float, int]:
    return (1.0, 2) if measure == "f1" else (100.0, 1)


def console_lines(table: Table) -> list[str]:
    """What stands above a printed table."""
    lines = [f"{table.title}: published for {table.model} | measured [95 % interval]"]
    return [*lines, table.note] if table.note else lines


def console_tables(table: Table, result: Reproduction, about: About) -> Iterator[RichTable]:
    """The table in pieces of a few columns each; none if nothing is known of it."""
    columns = columns_of(table, result)
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        made = RichTable(box=SIMPLE_HEAD)
        made.add_column("")
        part = columns[start : start + COLUMNS_AT_ONCE]
        for column in part:
            made.add_column(header(column, about), justify="right")
        for row in table.rows:
            cells = [(row, name, measure) for name, measure in part]
            texts = [
                f"{published_text(table, cell)} | {measured_text(result.cells.get(cell), cell[2])}"
                for cell in cells
            ]
            made.add_row(row.label, *texts)
        yield made


def json_rows(tables: Sequence[Table], result: Reproduction, about: About) -> list[dict[str, Any]]:
    """One row per cell with the keys ROW_KEYS; None where a figure is not at hand. `published_to` is the
    upper end of a published range. Rates are fractions."""
    rows = []
    for table in tables:
        for cell in table.cells():
            condition, name, measure = cell
            low, high = table.figures.get(cell, (None, None))
            measured = result.cells.get(cell)
            ends: tuple[float | None, ...] = (None, None, None)
            if measured is not None and not math.isnan(measured.rate.value):
                ends = (measured.rate.value, measured.rate.lo, measured.rate.hi)
            values = (
                table.id, table.title, table.source, condition.method, condition.vector, condition.k,
                condition.alpha, condition.where, name, measure, low, high if high != low else None,
                table.model, *ends, measured.clips if measured is not None else 0, about.model,
                about.data.get(name), about.stand_in,
            )  # fmt: skip
            rows.append(dict(zip(ROW_KEYS, values, strict=True)))
    return rows


# -- pictures


def distributions(
    probabilities: Mapping[str, Mapping[Condition, Sequence[float]]], subtitle: str, mark: str = ""
) -> bytes:
    """PNG: no_speech_prob of every clip (the lowest of its windows), one panel per data set, one line per
    condition; the papers' threshold is marked. mark: stands behind the names of the sets."""
    sets = [name for name, rows in probabilities.items() if rows]
    figure = _figure(4.2, 3.2, len(sets))
    for number, name in enumerate(sets):
        axes = figure.add_subplot(-(-len(sets) // 3), min(3, len(sets)), number + 1)
        for place, (condition, values) in enumerate(probabilities[name].items()):
            axes.hist(
                values, bins=BINS, range=(0, 1), weights=[100 / len(values)] * len(values),
                histtype="step", linewidth=1.6, color=_colour(condition, place), label=condition.label,
            )  # fmt: skip
        axes.axvline(NSP_THRESHOLD, color="#888888", linestyle=":", linewidth=1)
        clips = len(next(iter(probabilities[name].values())))
        axes.set_title(f"{name}{mark}, {clips} clips", fontsize=10, loc="left")
        axes.set_yscale("symlog", linthresh=5)
        axes.set_yticks([0, 1, 5, 20, 100], ["0", "1", "5", "20", "100"])
        _tidy(axes)
    for axes in figure.axes:
        axes.set_xlabel("no_speech_prob")
    for axes in figure.axes[::3]:
        axes.set_ylabel("% of clips")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _png(figure, "Distributions of no_speech_prob", subtitle)


def steering_picture(table: Table, result: Reproduction, subtitle: str) -> bytes | None:
    """PNG of SAE steering: FPR, mean over the data sets, against WER, published hollow, measured filled; None
    if no row has both."""
    from matplotlib.ticker import ScalarFormatter

    figure = _figure(9, 6, 1)
    axes = figure.add_subplot()
    drawn = 0
    places: dict[tuple[float, float], list[str]] = {}
    for number, k in enumerate(sorted({row.k for row in table.rows})):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for filled in (True, False):
            rows = [row for row in table.rows if row.k == k]
            points = [(row, point) for row in rows if (point := _point(table, result, row, filled))]
            drawn += len(points)
            axes.plot(
                [x for _, (x, _) in points], [y for _, (_, y) in points], linestyle="none", markersize=8,
                markerfacecolor=colour if filled else "none",
                label=f"k {k}, {'measured' if filled else 'published'}" if points else "_",
                color=colour, marker=marker,
            )  # fmt: skip
            for row, (x, y) in points:
                places.setdefault((x, y), []).append(f"{row.vector} k {row.k} α {row.alpha:g}")
    if not drawn:
        return None
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_xlabel(f"no_speech_prob < 0.5 on non-speech, mean over {', '.join(VECTOR_SETS)}, %")
    axes.set_ylabel("word error rate on speech, %")
    axes.legend(frameon=False, fontsize=9)
    axes.margins(0.12)
    _tidy(axes)
    title = "SAE steering: false positives against recognition"
    _png(figure, title, subtitle)  # settles the layout, in which the labels look for room
    label_apart(axes, places)
    return _png(figure, title, subtitle)


def _point(table: Table, result: Reproduction, row: Condition, measured: bool) -> tuple[float, float] | None:
    """(FPR, WER) in percent; the middle of a published range. None unless all of it is known."""
    cells: list[Cell] = [*((row, name, "nsp_fpr") for name in VECTOR_SETS), (row, LIBRISPEECH, "wer")]
    values = []
    for cell in cells:
        if measured and cell in result.cells:
            values.append(100 * result.cells[cell].rate.value)
        elif not measured and cell in table.figures:
            values.append(50 * sum(table.figures[cell]))
        else:
            return None
    *rates, wer = values
    # a WER of nought has no place on a logarithmic axis
    return (sum(rates) / len(rates), wer) if wer > 0 else None


def _figure(width: float, height: float, panels: int) -> Figure:
    # the figure's own canvas: no global state, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = min(3, panels), -(-panels // 3)
    figure = Figure(figsize=(width * columns, height * rows + 1.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colour(condition: Condition, place: int) -> str:
    return "black" if condition.method == "plain" else COLOURS[(place - 1) % len(COLOURS)]


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure, title: str, subtitle: str) -> bytes:
    figure.suptitle(f"{title}\n{subtitle}", fontsize=11, x=0.01, ha="left", wrap=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# -- files


def page(tables: Sequence[Table], result: Reproduction, about: About, pictures: Mapping[str, bytes]) -> str:
    """The whole report as one HTML document with its pictures inside."""
    from calibration.html_report import Markup, Row, details, facts, figure, headline, paragraph, section
    from calibration.html_report import page as document
    from calibration.html_report import table as html_table

    first, *more = about.lines(tables)
    body: list[Markup] = [headline(_sentence(tables, result), first, *more)]
    for name, picture in pictures.items():
        body.append(section(name, figure(picture, alt=f"{name}: {about.measured_on}")))
    for table in tables:
        columns = columns_of(table, result)
        if not columns:
            continue
        names = [
            name for column in columns for name in (f"{header(column, about)}, published", "measured [95 %]")
        ]
        rows = []
        for row in table.rows:
            cells = [(row, name, measure) for name, measure in columns]
            texts = [
                text
                for cell in cells
                for text in (published_text(table, cell), measured_text(result.cells.get(cell), cell[2]))
            ]
            rows.append(Row((row.label, *texts)))
        caption = f"published for {table.model}: {table.source}; measured on {about.measured_on}"
        body.append(section(table.title, html_table(("", *names), rows, caption=caption), note=table.note))
    if result.contrasts:
        folded = details("What counts as hallucinated in each fit", facts(result.contrasts))
        body.append(section("Fits", folded))
    footer = paragraph(
        "Rates with 95 % bootstrap intervals that draw speakers and source recordings whole; F1 over clips."
    )
    return document("Published and measured", body, subtitle=about.measured_on, footer=footer)


def _sentence(tables: Sequence[Table], result: Reproduction) -> str:
    """How many figures stand beside each other."""
    cells = [(table, cell) for table in tables for cell in table.cells()]
    both = sum(
        cell in table.figures and measured_text(result.cells.get(cell), cell[2]) != "-"
        for table, cell in cells
    )
    published = sum(len(table.figures) for table in tables)
    return f"{both} of {published} published figures have a measured one beside them."


def write_pictures_and_page(
    out: Path, tables: Sequence[Table], result: Reproduction, about: About
) -> list[Path]:
    """nsp_distributions.png and steering.png, where there is something to draw, and reproduce.html.

    Raises UsageError if a file cannot be written.
    """
    subtitle = about.measured_on
    if about.stand_in:
        subtitle += "; * stands in for the data set of that name"
    written, pictures = [], {}
    if any(result.probabilities.values()):
        picture = distributions(result.probabilities, subtitle, "*" * about.stand_in)
        pictures["Distributions of no_speech_prob"] = picture
        written.append(write_whole(out / "nsp_distributions.png", picture))
    for table in tables:
        if table.id == "audiosae-sae" and (drawn := steering_picture(table, result, subtitle)) is not None:
            pictures["SAE steering: false positives against recognition"] = drawn
            written.append(write_whole(out / "steering.png", drawn))
    written.append(write_whole(out / "reproduce.html", page(tables, result, about, pictures)))
    return written
