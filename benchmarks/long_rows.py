"""Rows of the long-recordings benchmark, and how they are shown.

A row is one method at one strength on one set: a sort of recordings, or "all" of them. Rates have 95 %
bootstrap intervals over recordings (name_lo, name_hi); what cannot be measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.long_measure import LongCounts
from benchmarks.long_truth import SORTS
from calibration.evaluate import Rate, bootstrap_ratio

RATES = ("invented_per_min", "lost", "substituted", "inserted")
PAIRED = ("invented_of_plain", "invented_more_than_vad", "lost_more_than_vad")
COLUMNS = (
    "method", "alpha", "set", "recordings", "minutes", "nonspeech_minutes", "words", "invented",
    *(name + end for name in RATES + PAIRED for end in ("", "_lo", "_hi")), "seconds_per_min",
)  # fmt: skip
ALL = "all"
TARGET_LEFT = 0.1  # of plain Whisper's invented words

Row = dict[str, Any]
Setting = tuple[str, float]  # (method, strength)


@dataclass(frozen=True)
class Measured:
    """One recording under one setting: its sort, length and compute time in seconds, and what was counted."""

    sort: str
    length: float
    seconds: float
    counts: LongCounts


def rows_of(
    measured: Mapping[Setting, Sequence[Measured]], plain: Setting | None, vad: Setting | None
) -> list[Row]:
    """Rows of every setting, its sets in the order of SORTS, "all" last. The recordings are the same, in the
    same order, for all settings; `plain` and `vad` are those that are compared with, None if not measured.

    invented_per_min: words per minute of non-speech; lost, substituted, inserted: fractions of the reference
    words. invented_of_plain: ratio to plain Whisper's; *_more_than_vad: difference of the rates.
    seconds_per_min: compute time per minute of audio.
    """
    rows = []
    for setting, items in measured.items():
        for name in (*SORTS, ALL):
            chosen = [place for place, item in enumerate(items) if name in (item.sort, ALL)]
            if chosen:
                others = [
                    None if other is None else [measured[other][place].counts for place in chosen]
                    for other in (plain, vad)
                ]
                row = _row([items[place] for place in chosen], *others)
                rows.append({**row, "method": setting[0], "alpha": setting[1], "set": name})
    return [{name: row[name] for name in COLUMNS} for row in rows]


def _row(
    items: Sequence[Measured], plain: Sequence[LongCounts] | None, vad: Sequence[LongCounts] | None
) -> Row:
    counts = [item.counts for item in items]
    quiet = [count.minutes for count in counts]
    words = [count.words for count in counts]
    invented = [count.invented for count in counts]
    minutes = sum(item.length for item in items) / 60
    rates = {
        "invented_per_min": bootstrap_ratio(invented, quiet),
        "lost": bootstrap_ratio([count.lost for count in counts], words),
        "substituted": bootstrap_ratio([count.substituted for count in counts], words),
        "inserted": bootstrap_ratio([count.inserted for count in counts], words),
        "invented_of_plain": _NONE,
        "invented_more_than_vad": _NONE,
        "lost_more_than_vad": _NONE,
    }
    if plain is not None:
        rates["invented_of_plain"] = bootstrap_ratio(invented, [count.invented for count in plain])
    if vad is not None:
        # the denominators are the same for both, so the difference of rates is the rate of differences
        more = [ours - theirs.invented for ours, theirs in zip(invented, vad, strict=True)]
        rates["invented_more_than_vad"] = bootstrap_ratio(more, quiet)
        more = [ours.lost - theirs.lost for ours, theirs in zip(counts, vad, strict=True)]
        rates["lost_more_than_vad"] = bootstrap_ratio(more, words)
    row: Row = {
        "recordings": len(items),
        "minutes": round(minutes, 3),
        "nonspeech_minutes": round(sum(quiet), 3),
        "words": sum(words),
        "invented": sum(invented),
        "seconds_per_min": round(sum(item.seconds for item in items) / minutes, 3),
    }
    for name, rate in rates.items():
        for end, value in (("", rate.value), ("_lo", rate.lo), ("_hi", rate.hi)):
            row[name + end] = None if math.isnan(value) else value
    return row


_NONE = Rate(math.nan, math.nan, math.nan)


def table(rows: Sequence[Row]) -> Table:
    """All rows; rates of words in per cent."""
    shown = Table(title="Words invented where nobody spoke, and words lost", box=SIMPLE_HEAD, show_edge=False)
    for name in ("set", "method", "strength"):
        shown.add_column(name, no_wrap=True)
    heads = ("invented/min", "of plain's %", "lost %", "lost, more than VAD", "subst. %", "s/min")
    for name in heads:
        shown.add_column(name, justify="right", no_wrap=True)
    names = [name for name in (*SORTS, ALL) if any(row["set"] == name for row in rows)]
    for name in names:
        chosen = [row for row in rows if row["set"] == name]
        for row in chosen:
            shown.add_row(
                name,
                row["method"],
                f"{row['alpha']:g}",
                _cell(row, "invented_per_min", 1),
                _cell(row, "invented_of_plain", 100),
                _cell(row, "lost", 100),
                _cell(row, "lost_more_than_vad", 100),
                _cell(row, "substituted", 100),
                f"{row['seconds_per_min']:.1f}",
                end_section=row is chosen[-1],
            )
    return shown


def _cell(row: Row, name: str, scale: float) -> str:
    if row[name] is None:
        return "-"
    value, lo, hi = (scale * row[name + end] for end in ("", "_lo", "_hi"))
    return f"{value:.1f} [{lo:.1f}, {hi:.1f}]"


def headline(rows: Sequence[Row], ours: str = "whisper-steer") -> list[str]:
    """A sentence per set and form of ours: invented words against plain Whisper's, lost words against the
    VAD's, and whether both targets are met."""
    lines = []
    for row in rows:
        if not row["method"].startswith(ours) or row["invented_of_plain"] is None:
            continue
        left = row["invented_of_plain"]
        line = (
            f"{row['method']} at {row['alpha']:g}, {row['set']}: {1 - left:.0%} fewer invented words than "
            f"plain Whisper (target {1 - TARGET_LEFT:.0%}: {'met' if left <= TARGET_LEFT else 'missed'})"
        )
        if row["lost_more_than_vad"] is not None:
            more = row["lost_more_than_vad"]
            line += (
                f"; lost words {100 * more:+.1f} points against the VAD (target: no more: "
                f"{'met' if more <= 0 else 'missed'})"
            )
        lines.append(line)
    return lines
