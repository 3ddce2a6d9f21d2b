"""Rows and paired differences from what methods heard: see reports.COLUMNS for what a row holds.

A set's rates are over its clips; WER and empty clips are of speech; text-FPR, nsp-FPR, HR and words per
minute of non-speech. A clip is lost where plain Whisper got a word right and the method wrote none: what is
empty but not lost held nothing but invented words. The pools all_speech and all_nonspeech join the sets of a
kind, their halves _synthetic and _real follow where both are there, and "all" has both pools in one row.
Intervals draw speakers and source recordings, not clips (`benchmarks.grouped`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import grouped
from benchmarks.hearing_cache import ClipRecord
from benchmarks.methods import Heard
from benchmarks.reports import ALL, ALL_NONSPEECH, ALL_SPEECH, COLUMNS, REAL, SYNTHETIC, Row
from calibration.evaluate import Rate, normalise, word_errors

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
    rates = _speech_rates([item for item in items if item.clip.is_speech], right or {})
    rates |= _nonspeech_rates([item for item in items if not item.clip.is_speech])
    for rate, found in rates.items():
        if not math.isnan(found.value):
            row |= {rate: found.value, f"{rate}_lo": found.lo, f"{rate}_hi": found.hi}
    row |= {"method": method, "alpha": alpha, "set": name, "clips": len(items)}
    row["audio"] = audio_of([item.clip for item in items])
    row["seconds"] = round(sum(item.heard.seconds for item in items), 3)
    return row


def _speech_rates(items: Sequence[Measured], right: Mapping[Key, bool]) -> dict[str, Rate]:
    """WER, its parts and lost clips; clips without a reference word are left out."""
    pairs = [(item, word_errors(item.clip.text or "", item.heard.text)) for item in items]
    kept = [(item, errors) for item, errors in pairs if errors is not None]
    groups = [item.clip.drawn_with for item, _ in kept]
    words = [errors.words for _, errors in kept]
    rates = {
        "wer": grouped.ratio([errors.total for _, errors in kept], words, groups),
        "sub": grouped.ratio([errors.substitutions for _, errors in kept], words, groups),
        "del": grouped.ratio([errors.deletions for _, errors in kept], words, groups),
        "ins": grouped.ratio([errors.insertions for _, errors in kept], words, groups),
        "empty_speech": grouped.share([not _wrote(item.heard) for item, _ in kept], groups),
    }
    known = [item for item, _ in kept if (item.clip.id, item.clip.crc) in right]
    lost = [right[item.clip.id, item.clip.crc] and not _wrote(item.heard) for item in known]
    return rates | {"lost_speech": grouped.share(lost, [item.clip.drawn_with for item in known])}


def _nonspeech_rates(items: Sequence[Measured]) -> dict[str, Rate]:
    """The three rates and words per minute; NaN for what the method's runtime does not show."""
    groups = [item.clip.drawn_with for item in items]
    words = [len(normalise(item.heard.text).split()) for item in items]
    rates = {
        "text_fpr": grouped.share([_wrote(item.heard) for item in items], groups),
        "words_per_min": grouped.ratio(words, [item.clip.seconds / 60 for item in items], groups),
    }
    for column, event in (("nsp_fpr", "nsp"), ("hr", "hr")):
        events = [getattr(item.heard, event) for item in items]
        if None not in events:
            rates[column] = grouped.share(events, groups)
    return rates


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
    silent = [(clip.drawn_with, _wrote(a) - _wrote(b)) for clip, a, b in pairs if not clip.is_speech]
    groups, errors, words, empty = [], [], [], []
    for clip, a, b in pairs:
        if not clip.is_speech:
            continue
        first, second = word_errors(clip.text or "", a.text), word_errors(clip.text or "", b.text)
        if first is None or second is None:
            continue  # no reference word
        groups.append(clip.drawn_with)
        errors.append(first.total - second.total)
        words.append(first.words)
        empty.append(_wrote(b) - _wrote(a))
    return {
        "text_fpr": grouped.share([event for _, event in silent], [group for group, _ in silent]),
        "wer": grouped.ratio(errors, words, groups),
        "empty_speech": grouped.share(empty, groups),
    }


def _wrote(heard: Heard) -> int:
    return int(bool(normalise(heard.text)))
