"""Rows of a benchmark as a person or a program reads them: tables, sentences, CSV, points of a plot.

A row is a dict with the keys COLUMNS; a rate that its set cannot have is None (WER of non-speech, FPR of
speech).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import Point
from whisper_steer.errors import UsageError

NONSPEECH_RATES = ("text_fpr", "nsp_fpr", "hr", "words_per_min")
SPEECH_RATES = ("wer", "sub", "del", "ins", "empty_speech")
RATES = NONSPEECH_RATES + SPEECH_RATES
COLUMNS = (
    "method", "alpha", "set", "clips", "audio",
    *(name + end for name in RATES for end in ("", "_lo", "_hi")), "seconds",
)  # fmt: skip
ALL_SPEECH, ALL_NONSPEECH = "all_speech", "all_nonspeech"
TARGET_FALL, TARGET_RISE = 0.8, 0.005  # at alpha 1: text-FPR relative, WER absolute

Row = dict[str, Any]


def _percent(row: Row, name: str, scale: float = 100.0) -> str:
    if row.get(name) is None:
        return "-"
    value, lo, hi = (scale * row[name + end] for end in ("", "_lo", "_hi"))
    return f"{value:.1f} [{lo:.1f}, {hi:.1f}]"


def _parts(row: Row) -> str:
    if row.get("wer") is None:
        return "-"
    return " / ".join(f"{100 * row[name]:.1f}" for name in ("sub", "del", "ins"))


def pooled_rows(rows: Sequence[Row]) -> Iterator[tuple[str, float, Row, Row]]:
    """(method, alpha, all_nonspeech row, all_speech row); an empty row where the sets hold no such clips."""
    by_setting: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_setting.setdefault((row["method"], row["alpha"]), {})[row["set"]] = row
    for (method, alpha), by_set in by_setting.items():
        yield method, alpha, by_set.get(ALL_NONSPEECH, {}), by_set.get(ALL_SPEECH, {})


def headline(rows: Sequence[Row]) -> list[str]:
    """A sentence per method: pooled rates at alpha 1 (or the largest below) against plain and the targets."""
    settings: dict[str, dict[float, tuple[Row, Row]]] = {}
    for method, alpha, silent, spoken in pooled_rows(rows):
        settings.setdefault(method, {})[alpha] = (silent, spoken)
    lines = []
    for method, by_alpha in settings.items():
        top = max((alpha for alpha in by_alpha if alpha <= 1), default=0.0)
        if 0.0 not in by_alpha or top == 0.0:
            continue
        (silent0, spoken0), (silent1, spoken1) = by_alpha[0.0], by_alpha[top]
        parts = []
        if silent0.get("text_fpr"):
            fall = 1 - silent1["text_fpr"] / silent0["text_fpr"]
            verdict = "reached" if fall >= TARGET_FALL else "missed"
            parts.append(
                f"text-FPR {100 * silent0['text_fpr']:.1f} -> {100 * silent1['text_fpr']:.1f} % "
                f"({100 * -fall:+.0f} % relative; target -80 %: {verdict})"
            )
        if spoken0.get("wer") is not None:
            rise = spoken1["wer"] - spoken0["wer"]
            verdict = "reached" if rise <= TARGET_RISE else "missed"
            parts.append(
                f"WER {100 * spoken0['wer']:.2f} -> {100 * spoken1['wer']:.2f} % "
                f"({100 * rise:+.2f} points; target at most +0.5: {verdict})"
            )
        lines.append(f"{method}, alpha {top:g}: " + "; ".join(parts))
    return lines


def tables(rows: Sequence[Row]) -> list[Any]:
    """Two rich tables: every setting, sets pooled; every set, at alpha 0 and at 1 (or the largest below)."""
    from rich.table import Table

    pooled = Table(title="All sets: value [95 % bootstrap interval over clips]", title_justify="left")
    pooled.add_column("method")
    for name in (
        "alpha", "text-FPR %", "nsp-FPR %", "HR %", "words/min", "WER %", "sub / del / ins %",
        "empty speech %", "seconds",
    ):  # fmt: skip
        pooled.add_column(name, justify="right")
    previous = None
    for method, alpha, silent, spoken in pooled_rows(rows):
        if previous not in (None, method):
            pooled.add_section()
        pooled.add_row(
            "" if previous == method else method, f"{alpha:g}",
            *(_percent(silent, name) for name in NONSPEECH_RATES[:3]), _percent(silent, "words_per_min", 1.0),
            _percent(spoken, "wer"), _parts(spoken), _percent(spoken, "empty_speech"),
            f"{silent.get('seconds', 0) + spoken.get('seconds', 0):.1f}",
        )  # fmt: skip
        previous = method

    alphas = sorted({row["alpha"] for row in rows if row["alpha"] <= 1})
    shown = [alphas[0], alphas[-1]] if len(alphas) > 1 else alphas
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = [
        (method, alpha) for method in methods for alpha in shown if alpha > 0 or method == methods[0]
    ]
    found = {(row["method"], row["alpha"], row["set"]): row for row in rows}
    by_set = Table(
        title="By set: text-FPR % of non-speech, WER % of speech (and empty clips %)", title_justify="left"
    )
    for name in ("set", "clips", "audio"):
        by_set.add_column(name, justify="right" if name == "clips" else "left")
    for method, alpha in columns:
        by_set.add_column("plain (alpha 0)" if alpha == 0 else f"{method}, alpha {alpha:g}", justify="right")
    names = [name for name in dict.fromkeys(row["set"] for row in rows) if not name.startswith("all_")]
    for name in names:
        first = next(row for row in rows if row["set"] == name)
        cells = [_set_cell(found[method, alpha, name]) for method, alpha in columns]
        by_set.add_row(name, str(first["clips"]), first["audio"], *cells)
    return [pooled, by_set]


def _set_cell(row: Row) -> str:
    if row["wer"] is None:
        return _percent(row, "text_fpr")
    return f"{_percent(row, 'wer')} ({100 * row['empty_speech']:.1f})"


def curves(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Points of the frontier by method; settings without both rates are left out."""
    points: dict[str, list[Point]] = {}
    for method, alpha, silent, spoken in pooled_rows(rows):
        if silent.get("text_fpr") is None or spoken.get("wer") is None:
            continue
        across = (silent["text_fpr"], silent["text_fpr_lo"], silent["text_fpr_hi"])
        up = (spoken["wer"], spoken["wer_lo"], spoken["wer_hi"])
        points.setdefault(method, []).append(Point(alpha, across, up))
    return points


def write_text(path: Path, text: str) -> Path:
    """Writes `path` as a whole or not at all. Raises UsageError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; choose another --out or --json"
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return path


def as_csv(rows: Sequence[Row]) -> str:
    """Header and rows; an empty cell where a row cannot measure a rate."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
