"""Rows of a benchmark as a person or a program reads them: tables, sentences, CSV.

A row is a dict with the keys COLUMNS; a rate that its set cannot have is None (WER of non-speech, FPR of
speech).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

NONSPEECH_RATES = ("text_fpr", "nsp_fpr", "hr", "words_per_min")
# lost_speech: clips of which plain Whisper got a word right and the method wrote nothing
SPEECH_RATES = ("wer", "sub", "del", "ins", "empty_speech", "lost_speech")
RATES = NONSPEECH_RATES + SPEECH_RATES
COLUMNS = (
    "method", "alpha", "set", "clips", "audio",
    *(name + end for name in RATES for end in ("", "_lo", "_hi")), "seconds",
)  # fmt: skip
ALL_SPEECH, ALL_NONSPEECH, ALL = "all_speech", "all_nonspeech", "all"
SYNTHETIC, REAL = "_synthetic", "_real"  # ends of the names of a pool's halves
# at alpha 1: text-FPR relative, WER absolute, share of speech clips that come back empty
TARGET_FALL, TARGET_RISE, TARGET_EMPTY = 0.95, 0.001, 0.002

OURS = ("whisper-steer", "ours-")  # how the names of our methods begin
IN_SET_TABLE = ("whisper-steer", "whisper-steer+vad", "silero", "linear-gate")  # preferred, of at most 4

Row = dict[str, Any]


def _percent(row: Row, name: str, scale: float = 100.0, none: str = "-") -> str:
    if row.get(name) is None:
        return none
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
    """Sentences per method of ours (of all where none is ours): pooled rates at alpha 1 (or the largest
    below) against plain and the targets; on all clips, then on the synthetic and the real ones where there
    are both."""
    rows = [row for row in rows if row["method"].startswith(OURS)] or rows
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
                f"({100 * change:+.0f} % relative; target -{100 * TARGET_FALL:g} %: {verdict})"
            )
        if spoken0.get("wer") is not None:
            rise = spoken1["wer"] - spoken0["wer"]
            verdict = "reached" if rise <= TARGET_RISE else "missed"
            parts.append(
                f"WER {100 * spoken0['wer']:.2f} -> {100 * spoken1['wer']:.2f} % "
                f"({100 * rise:+.2f} points; target at most +{100 * TARGET_RISE:g}: {verdict})"
            )
            empty0, empty1 = spoken0["empty_speech"], spoken1["empty_speech"]
            verdict = "reached" if empty1 <= TARGET_EMPTY else "missed"
            parts.append(
                f"empty speech clips {100 * empty0:.1f} -> {100 * empty1:.1f} % "
                f"(target at most {100 * TARGET_EMPTY:g}: {verdict})"
            )
            if spoken1.get("lost_speech") is not None:
                parts.append(f"of them with a right word before: {100 * spoken1['lost_speech']:.1f} %")
        if parts:
            lines.append(f"{method}, alpha {top:g}{which}: " + "; ".join(parts))
    return lines


def tables(rows: Sequence[Row], minutes: Mapping[str, float] | None = None) -> list[Table]:
    """Three rich tables: non-speech and speech, all their sets pooled, at every setting; then every set at
    alpha 0 and, for some methods, at 1 (or the largest below).

    minutes: of audio, by set: compute time is then shown in seconds per minute of it.
    """
    pooled = list(pooled_rows(rows))
    unit = "seconds" if minutes is None else "s per min"
    nonspeech = _table("On non-speech, all sets", ("text-FPR %", "nsp-FPR %", "HR %", "words/min", unit))
    speech = _table(
        "On speech, all sets", ("WER %", "sub / del / ins %", "empty clips %", "lost clips %", unit)
    )

    def effort(row: Row) -> str:
        length = 1.0 if minutes is None else minutes.get(row["set"], 0.0)
        return f"{row['seconds'] / length:.1f}" if length else "-"

    previous = None
    for method, alpha, silent, spoken in pooled:
        new = method != previous
        if silent:
            rates = [_percent(silent, name, none="not given") for name in ("text_fpr", "nsp_fpr", "hr")]
            words = _percent(silent, "words_per_min", 1.0)
            _add(nonspeech, new, method, alpha, *rates, words, effort(silent))
        if spoken:
            wer, empty, lost = (_percent(spoken, name) for name in ("wer", "empty_speech", "lost_speech"))
            parts = " / ".join(f"{100 * spoken[name]:.1f}" for name in ("sub", "del", "ins"))
            _add(speech, new, method, alpha, wer, parts, empty, lost, effort(spoken))
        previous = method
    return [table for table in (nonspeech, speech) if table.rows] + [_set_table(rows)]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=f"{title}: value [95 % bootstrap interval over speakers and sources]",
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
    alphas: dict[str, list[float]] = {}
    for row in rows:
        alphas.setdefault(row["method"], []).append(row["alpha"])
    columns = [(name, 0.0) for name, found in alphas.items() if 0.0 in found][:1]
    shown = [name for name in dict.fromkeys((*IN_SET_TABLE, *alphas)) if name in alphas]
    settings = [(name, max((alpha for alpha in alphas[name] if alpha <= 1), default=0.0)) for name in shown]
    columns += [setting for setting in settings if setting[1] > 0][: len(IN_SET_TABLE)]
    by_setting = {(row["method"], row["alpha"], row["set"]): row for row in rows}
    table = Table(
        title="By set: text-FPR % of non-speech; WER % of speech (and empty clips %)",
        title_justify="left", title_style="bold", box=SIMPLE_HEAD,
    )  # fmt: skip
    for name in ("set", "clips", "audio"):
        table.add_column(name, justify="right" if name == "clips" else "left")
    for method, alpha in columns:
        table.add_column("plain (alpha 0)" if alpha == 0 else f"{method}, alpha {alpha:g}", justify="right")
    for name in dict.fromkeys(row["set"] for row in rows):
        if name not in (ALL_SPEECH, ALL_NONSPEECH, ALL):
            cells = [by_setting[method, alpha, name] for method, alpha in columns]
            table.add_row(name, str(cells[0]["clips"]), cells[0]["audio"], *map(_set_cell, cells))
    return table


def _set_cell(row: Row) -> str:
    if row["wer"] is None:
        return _percent(row, "text_fpr")
    return f"{_percent(row, 'wer')} ({100 * row['empty_speech']:.1f})"


def paired_table(paired: Sequence[Row]) -> Table | None:
    """Every setting's differences from ours over the same clips, all sets pooled; None without any."""
    chosen = [row for row in paired if row["set"] == ALL]
    if not chosen:
        return None
    reference = f"{chosen[0]['reference']}, alpha {chosen[0]['reference_alpha']:g}"
    columns = ("text-FPR, points", "WER, points", "empty clips, points")
    table = _table(f"Minus {reference}, on the same clips (above 0: worse than ours)", columns)
    previous = None
    for row in chosen:
        cells = [_points_of(row, name) for name in ("text_fpr", "wer", "empty_speech")]
        _add(table, row["method"] != previous, row["method"], row["alpha"], *cells)
        previous = row["method"]
    return table


def _points_of(row: Row, name: str) -> str:
    if row[f"{name}_diff"] is None:
        return "-"
    value, lo, hi = (100 * row[f"{name}_diff{end}"] + 0.0 for end in ("", "_lo", "_hi"))
    return f"{value:+.1f} [{lo:+.1f}, {hi:+.1f}]"


def as_csv(rows: Sequence[Row]) -> str:
    """Header and rows; an empty cell where a row cannot measure a rate."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
