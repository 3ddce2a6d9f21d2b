"""Rows and paired differences from what methods heard: see reports.COLUMNS for what a row holds.

A set's rates are over its clips; WER and empty clips are of speech; text-FPR, nsp-FPR, HR and words per
minute of non-speech. A clip is lost where plain Whisper got a word right and the method wrote none: what is
empty but not lost held nothing but invented words. The pools all_speech and all_nonspeech join the sets of a
kind, their halves _synthetic and _real follow where both are there, and "all" has both pools in one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.hearing_cache import ClipRecord
from benchmarks.methods import Heard
from benchmarks.reports import ALL, ALL_NONSPEECH, ALL_SPEECH, COLUMNS, REAL, SYNTHETIC, Row
from calibration.evaluate import (
    Outcome,
    Rate,
    bootstrap_ratio,
    bootstrap_share,
    nonspeech_metrics,
    normalise,
    speech_metrics,
    word_errors,
)

DIFFERENCES = ("text_fpr", "wer", "empty_speech")
PAIRED_COLUMNS = (
    "method", "alpha", "reference", "reference_alpha", "set", "clips",
    *(f"{name}{end}" for name in DIFFERENCES for end in ("_diff", "_diff_lo", "_diff_hi")),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One clip under one setting."""

    clip: ClipRecord
    heard: Heard


def pools(measured: Mapping[str, Sequence[Measured]]) -> dict[str, list[Measured]]:
    """The clips of every row, by its "set", in the order of the rows; empty ones are left out."""
    groups = {name: list(items) for name, items in measured.items()}
    everything = [item for items in groups.values() for item in items]
    speech = [item for item in everything if item.clip.is_speech]
    nonspeech = [item for item in everything if not item.clip.is_speech]
    groups |= {ALL_SPEECH: speech, ALL_NONSPEECH: nonspeech}
    for name, items in ((ALL_SPEECH, speech), (ALL_NONSPEECH, nonspeech)):
        if audio_of([item.clip for item in items]) == "synthetic+real":
            groups[name + SYNTHETIC] = [item for item in items if item.clip.path is None]
            groups[name + REAL] = [item for item in items if item.clip.path is not None]
    groups[ALL] = everything
    return {name: items for name, items in groups.items() if items}


Key = tuple[str, int]  # id and checksum of a clip


def understood(plain: Mapping[str, Sequence[Measured]]) -> dict[Key, bool]:
    """Of every speech clip under plain Whisper: whether it got at least one word of the reference right."""
    found: dict[Key, bool] = {}
    for item in (item for items in plain.values() for item in items if item.clip.is_speech):
        errors = word_errors(item.clip.text or "", item.heard.text)
        if errors is not None:
            right = errors.words - errors.substitutions - errors.deletions
            found[item.clip.id, item.clip.crc] = right > 0
    return found


def summarise(
    measured: Mapping[str, Sequence[Measured]],
    method: str,
    alpha: float,
    right: Mapping[Key, bool] | None = None,
) -> list[Row]:
    """One row per set, then the pools. What a set, or the method's runtime, cannot show is None.

    right: `understood` of plain Whisper on the same clips; without it lost_speech is None.
    """
    return [_row(method, alpha, name, items, right) for name, items in pools(measured).items()]


def _row(
    method: str, alpha: float, name: str, items: Sequence[Measured], right: Mapping[Key, bool] | None
) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    speech = [item for item in items if item.clip.is_speech]
    nonspeech = [item for item in items if not item.clip.is_speech]
    rates: dict[str, float] = {}
    if speech:
        references = [item.clip.text or "" for item in speech]
        rates |= speech_metrics(references, [item.heard.text for item in speech]).row()
        known = [
            (right[key], item) for item in speech if right and (key := (item.clip.id, item.clip.crc)) in right
        ]
        if known:
            rate = bootstrap_share([had and not _wrote(item.heard) for had, item in known])
            rates |= {"lost_speech": rate.value, "lost_speech_lo": rate.lo, "lost_speech_hi": rate.hi}
    if nonspeech:
        rates |= nonspeech_metrics([_outcome(item) for item in nonspeech]).row()
        for event in ("nsp", "hr"):
            if any(getattr(item.heard, event) is None for item in nonspeech):
                column = {"nsp": "nsp_fpr", "hr": "hr"}[event]
                rates |= dict.fromkeys((column, f"{column}_lo", f"{column}_hi"), math.nan)
    row |= {key: None if math.isnan(value) else value for key, value in rates.items() if key in row}
    row |= {"method": method, "alpha": alpha, "set": name, "clips": len(items)}
    row["audio"] = audio_of([item.clip for item in items])
    row["seconds"] = round(sum(item.heard.seconds for item in items), 3)
    return row


def _outcome(item: Measured) -> Outcome:
    return Outcome(item.heard.text, bool(item.heard.nsp), bool(item.heard.hr), item.clip.seconds)


def audio_of(clips: Sequence[ClipRecord]) -> str:
    """Where clips come from: "synthetic", "real" or "synthetic+real"."""
    real = sum(clip.path is not None for clip in clips)
    return "synthetic" if not real else "real" if real == len(clips) else "synthetic+real"


# -- the same clips under two methods -------------------------------------------------------------------


def paired(
    mine: Mapping[str, Sequence[Measured]],
    reference: Mapping[str, Sequence[Measured]],
    method: tuple[str, float],
    reference_method: tuple[str, float],
) -> list[dict[str, Any]]:
    """Differences method minus reference over the same clips, pooled, with paired bootstrap intervals: over
    all clips, then the synthetic and the real ones where there are both.

    Positive: the method is worse. An interval that leaves out 0 is a difference that the clips show.
    """
    theirs = {(item.clip.id, item.clip.crc): item.heard for items in reference.values() for item in items}
    pairs = [
        (item.clip, item.heard, theirs[item.clip.id, item.clip.crc])
        for items in mine.values()
        for item in items
    ]
    halves = {ALL: pairs}
    if audio_of([clip for clip, _, _ in pairs]) == "synthetic+real":
        halves["all" + SYNTHETIC] = [pair for pair in pairs if pair[0].path is None]
        halves["all" + REAL] = [pair for pair in pairs if pair[0].path is not None]
    rows = []
    for name, chosen in halves.items():
        row: dict[str, Any] = dict.fromkeys(PAIRED_COLUMNS)
        row |= {"method": method[0], "alpha": method[1], "set": name, "clips": len(chosen)}
        row |= {"reference": reference_method[0], "reference_alpha": reference_method[1]}
        for rate, value in _differences(chosen).items():
            if not math.isnan(value.value):
                row |= {f"{rate}_diff": value.value, f"{rate}_diff_lo": value.lo, f"{rate}_diff_hi": value.hi}
        rows.append(row)
    return rows


def _differences(pairs: Sequence[tuple[ClipRecord, Heard, Heard]]) -> dict[str, Rate]:
    events = [_wrote(a) - _wrote(b) for clip, a, b in pairs if not clip.is_speech]
    errors, words, empty = [], [], []
    for clip, a, b in pairs:
        if not clip.is_speech:
            continue
        first, second = word_errors(clip.text or "", a.text), word_errors(clip.text or "", b.text)
        if first is None or second is None:
            continue  # no reference word
        errors.append(first.total - second.total)
        words.append(first.words)
        empty.append(_wrote(b) - _wrote(a))
    return {
        "text_fpr": bootstrap_ratio(events, np.ones(len(events))),
        "wer": bootstrap_ratio(errors, words),
        "empty_speech": bootstrap_ratio(empty, np.ones(len(empty))),
    }


def _wrote(heard: Heard) -> int:
    return int(bool(normalise(heard.text)))
