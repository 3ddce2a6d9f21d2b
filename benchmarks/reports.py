"""Rows of a benchmark as a person or a program reads them: tables, sentences, CSV, points of a plot.

A row is a dict with the keys COLUMNS; a rate that its set cannot have is None (WER of non-speech, FPR of
speech).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.plots import Point

NONSPEECH_RATES = ("text_fpr", "nsp_fpr", "hr", "words_per_min")
SPEECH_RATES = ("wer", "sub", "del", "ins", "empty_speech")
RATES = NONSPEECH_RATES + SPEECH_RATES
COLUMNS = (
    "method", "alpha", "set", "clips", "audio",
    *(name + end for name in RATES for end in ("", "_lo", "_hi")), "seconds",
)  # fmt: skip
ALL_SPEECH, ALL_NONSPEECH = "all_speech", "all_nonspeech"
SYNTHETIC, REAL = "_synthetic", "_real"  # ends of the names of a pool's halves
TARGET_FALL, TARGET_RISE = 0.8, 0.005  # at alpha 1: text-FPR relative, WER absolute

Row = dict[str, Any]


def _percent(row: Row, name: str, scale: float = 100.0) -> str:
    if row.get(name) is None:
        return "-"
    value, lo, hi = (scale * row[name + end] for end in ("", "_lo", "_hi"))
    return f"{value:.1f} [{lo:.1f}, {hi:.1f}]"


def pooled_rows(rows: Sequence[Row], half: str = "") -> Iterator[tuple[str, float, Row, Row]]:
    """(method, alpha, all_nonspeech row, all_speech row), or of one half of both pools; an empty row where
    there are no such clips."""
    by_setting: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_setting.setdefault((row["method"], row["alpha"]), {})[row["set"]] = row
    for (method, alpha), by_set in by_setting.items():
        yield method, alpha, by_set.get(ALL_NONSPEECH + half, {}), by_set.get(ALL_SPEECH + half, {})


def headline(rows: Sequence[Row]) -> list[str]:
    """Sentences per method: pooled rates at alpha 1 (or the largest below) against plain and the targets; on
    all clips, then on the synthetic and the real ones where there are both."""
    lines = []
    for half, which in (("", ""), (SYNTHETIC, ", synthetic clips"), (REAL, ", real clips")):
        lines += _sentences(list(pooled_rows(rows, half)), which)
    return lines


def _sentences(pooled: Sequence[tuple[str, float, Row, Row]], which: str) -> list[str]:
    settings: dict[str, dict[float, tuple[Row, Row]]] = {}
    for method, alpha, silent, spoken in pooled:
        settings.setdefault(method, {})[alpha] = (silent, spoken)
    lines = []
    for method, by_alpha in settings.items():
        top = max((alpha for alpha in by_alpha if alpha <= 1), default=0.0)
        if 0.0 not in by_alpha or top == 0.0:
            continue
        (silent0, spoken0), (silent1, spoken1) = by_alpha[0.0], by_alpha[top]
        parts = []
        if silent0.get("text_fpr"):
            change = silent1["text_fpr"] / silent0["text_fpr"] - 1
            verdict = "reached" if change <= -TARGET_FALL else "missed"
            parts.append(
                f"text-FPR {100 * silent0['text_fpr']:.1f} -> {100 * silent1['text_fpr']:.1f} % "
                f"({100 * change:+.0f} % relative; target -80 %: {verdict})"
            )
        if spoken0.get("wer") is not None:
            rise = spoken1["wer"] - spoken0["wer"]
            verdict = "reached" if rise <= TARGET_RISE else "missed"
            parts.append(
                f"WER {100 * spoken0['wer']:.2f} -> {100 * spoken1['wer']:.2f} % "
                f"({100 * rise:+.2f} points; target at most +0.5: {verdict})"
            )
        if parts:
            lines.append(f"{method}, alpha {top:g}{which}: " + "; ".join(parts))
    return lines


def tables(rows: Sequence[Row]) -> list[Table]:
    """Three rich tables: non-speech and speech, all their sets pooled, at every setting; then every set at
    alpha 0 and at 1 (or the largest below)."""
    pooled = list(pooled_rows(rows))
    nonspeech = _table("On non-speech, all sets", ("text-FPR %", "nsp-FPR %", "HR %", "words/min", "seconds"))
    speech = _table("On speech, all sets", ("WER %", "sub / del / ins %", "empty clips %", "seconds"))
    previous = None
    for method, alpha, silent, spoken in pooled:
        new = method != previous
        if silent:
            rates = [_percent(silent, name) for name in ("text_fpr", "nsp_fpr", "hr")]
            words = _percent(silent, "words_per_min", 1.0)
            _add(nonspeech, new, method, alpha, *rates, words, f"{silent['seconds']:.1f}")
        if spoken:
            wer, empty = _percent(spoken, "wer"), _percent(spoken, "empty_speech")
            parts = " / ".join(f"{100 * spoken[name]:.1f}" for name in ("sub", "del", "ins"))
            _add(speech, new, method, alpha, wer, parts, empty, f"{spoken['seconds']:.1f}")
        previous = method
    return [table for table in (nonspeech, speech) if table.rows] + [_set_table(rows)]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=f"{title}: value [95 % bootstrap interval over clips]",
        title_justify="left", title_style="bold", box=SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("method")
    for name in ("alpha", *columns):
        table.add_column(name, justify="right")
    return table


def _add(table: Table, new: bool, method: str, alpha: float, *cells: str) -> None:
    if new and table.rows:
        table.add_section()
    table.add_row(method if new else "", f"{alpha:g}", *cells)


def _set_table(rows: Sequence[Row]) -> Table:
    alphas = sorted({row["alpha"] for row in rows})
    shown = dict.fromkeys((alphas[0], max((alpha for alpha in alphas if alpha <= 1), default=alphas[0])))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = [
        (method, alpha) for method in methods for alpha in shown if alpha > 0 or method == methods[0]
    ]
    found = {(row["method"], row["alpha"], row["set"]): row for row in rows}
    table = Table(
        title="By set: text-FPR % of non-speech; WER % of speech (and empty clips %)",
        title_justify="left", title_style="bold", box=SIMPLE_HEAD,
    )  # fmt: skip
    for name in ("set", "clips", "audio"):
        table.add_column(name, justify="right" if name == "clips" else "left")
    for method, alpha in columns:
        table.add_column("plain (alpha 0)" if alpha == 0 else f"{method}, alpha {alpha:g}", justify="right")
    for name in dict.fromkeys(row["set"] for row in rows):
        if name not in (ALL_SPEECH, ALL_NONSPEECH):
            cells = [found[method, alpha, name] for method, alpha in columns]
            table.add_row(name, str(cells[0]["clips"]), cells[0]["audio"], *map(_set_cell, cells))
    return table


def _set_cell(row: Row) -> str:
    if row["wer"] is None:
        return _percent(row, "text_fpr")
    return f"{_percent(row, 'wer')} ({100 * row['empty_speech']:.1f})"


def curves(rows: Sequence[Row]) -> dict[str, dict[str, list[Point]]]:
    """Points of the frontier by panel and method: one panel each for synthetic and real clips where both
    pools have both, else one for all. Settings without both rates are left out."""
    panels = {"synthetic clips": _points(rows, SYNTHETIC), "real recordings": _points(rows, REAL)}
    if not all(panels.values()):
        panels = {"all clips": _points(rows, "")}
    return {name: points for name, points in panels.items() if points}


def _points(rows: Sequence[Row], half: str) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for method, alpha, silent, spoken in pooled_rows(rows, half):
        if silent.get("text_fpr") is None or spoken.get("wer") is None:
            continue
        across = (silent["text_fpr"], silent["text_fpr_lo"], silent["text_fpr_hi"])
        up = (spoken["wer"], spoken["wer_lo"], spoken["wer_hi"])
        points.setdefault(method, []).append(Point(alpha, across, up))
    return points


def as_csv(rows: Sequence[Row]) -> str:
    """Header and rows; an empty cell where a row cannot measure a rate."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
