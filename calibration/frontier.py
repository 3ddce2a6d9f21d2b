"""The frontier of a steering: what every alpha costs in words and saves in invented ones, and named points
on it.

Every point speaks for the same clips. What withholding alone decides is known of all of them without hearing
anything again; only clips that keep a window in which an edit acts have to be heard at another alpha, and
of these some are: what they differ in from what was known stands for the others, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calibration.decoding import ClipTranscript
from calibration.evaluate import Rate, bootstrap_ratio, evenly
from calibration.gated_hearing import GatedHearing
from calibration.hearing import Heard
from calibration.selection import CalibrationClip
from calibration.speech_costs import SpeechCosts
from whisper_steer.steering import Edit, MeanAblation

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
STRICT = 10.0  # the strict profile's budget, in units of the calibration's
STRICT_EMPTY = 0.01  # share of speech clips that the strict profile may leave without a word
PROFILES = ("gentle", "balanced", "strict")
_LEAST = 8  # clips of a kind that are heard at least, where any has to be

Point = dict[str, Any]
Transcripts = Mapping[tuple[str, str], ClipTranscript]


def point(
    alpha: float,
    threshold: float | None,
    clips: Sequence[CalibrationClip],
    known: Transcripts,
    unsure: Sequence[CalibrationClip] = (),
    heard: Transcripts | None = None,
) -> Point:
    """One point of the frontier: rates as fractions with their 95 % bootstrap intervals, and the clips that
    they rest on.

    known: of all clips. unsure: those of which something else may come out. heard: what does, of some of
    these; their mean difference from `known` counts for all of `unsure`, by kind of clip (a difference
    estimator).
    """
    heard = heard or {}
    speech = [clip for clip in clips if clip.is_speech]
    others = [clip for clip in clips if not clip.is_speech]
    costs = SpeechCosts(speech)

    def spoken(transcripts: Sequence[ClipTranscript]) -> np.ndarray:
        emptied = [clip.is_emptied(t) for clip, t in zip(speech, transcripts, strict=True)]
        return np.stack([costs.errors([t.text for t in transcripts]) - costs.plain, emptied])

    def silent(transcripts: Sequence[ClipTranscript]) -> np.ndarray:
        outcomes = [clip.outcome(t) for clip, t in zip(others, transcripts, strict=True)]
        return np.array([[o.text_fp, o.nsp, o.hr] for o in outcomes], dtype=float).reshape(-1, 3).T

    change, emptied = _corrected(spoken, speech, known, unsure, heard)
    rates = _corrected(silent, others, known, unsure, heard)
    groups = [clip.group for clip in others]
    found: Point = {"alpha": alpha, "threshold": threshold}
    for name, values in zip(("text_fpr", "nsp_fpr", "hr"), rates, strict=True):
        rate = bootstrap_ratio(values, np.ones(len(values)), groups=groups)
        found |= _flat(name, rate)
    rise, rise_hi = costs.rise(change)
    return {
        **found,
        "wer_rise": rise,
        "wer_rise_hi": rise_hi,
        "empty_speech": min(max(float(emptied.mean()), 0.0), 1.0) if len(emptied) else float("nan"),
        "clips": len(clips),
        "nonspeech_clips": len(others),
        "speech_clips": len(speech),
        "unheard_clips": len(unsure) - len(heard),
    }


def _corrected(
    measure: Callable[[Sequence[ClipTranscript]], np.ndarray],
    clips: Sequence[CalibrationClip],
    known: Transcripts,
    unsure: Sequence[CalibrationClip],
    heard: Transcripts,
) -> np.ndarray:
    """(measures, clips): `measure` of what is known, those of heard clips moved by their difference times the
    number of unsure clips that each of them stands for."""
    keys = [(clip.set, clip.id) for clip in clips]
    before = np.asarray(measure([known[key] for key in keys]), dtype=float)
    after = np.asarray(measure([heard.get(key, known[key]) for key in keys]), dtype=float)
    mine = set(keys)
    stands_for = sum((clip.set, clip.id) in mine for clip in unsure) / max(len(mine & set(heard)), 1)
    return before + stands_for * (after - before)


def _flat(name: str, rate: Rate) -> dict[str, float]:
    values = np.clip([rate.value, rate.lo, rate.hi], 0.0, 1.0).tolist()  # NaN stays
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), values, strict=True))


def measure_frontier(
    hearing: GatedHearing,
    edits: Sequence[Edit],
    clips: Sequence[CalibrationClip],
    at_one: Heard,
    all_clips: Sequence[CalibrationClip],
    *,
    alphas: Sequence[float] = ALPHAS,
    progress: bool = True,
) -> list[Point]:
    """Points at `alphas`, all of `all_clips`; the one at alpha 1 is `at_one`.

    clips: those that are heard at the other alphas, where an edit may change what comes out. What is known of
    all is below alpha 1 the plain transcript and above it that of `at_one`, each less the windows that are
    withheld. Silence (MeanAblation at full strength) does not change above alpha 1: nothing is heard again.
    """
    saturated = all(isinstance(edit, MeanAblation) and edit.strength >= 1 for edit in edits)
    touched = hearing.touched(all_clips, progress=progress) if edits else set()
    plain = {(clip.set, clip.id): clip.transcript for clip in all_clips}
    points = []
    for alpha in alphas:
        threshold = hearing.gate.window_threshold(alpha)
        if alpha == 1.0:
            points.append(point(1.0, threshold, all_clips, at_one.transcripts))
            continue
        known = hearing.withheld_at(plain if alpha < 1 else at_one.transcripts, all_clips, alpha)
        unsure = [c for c in all_clips if (c.set, c.id) in touched and hearing.passes(c, alpha)]
        if alpha > 1 and saturated:
            unsure = []
        chosen = _to_hear(unsure, clips)
        label = f"frontier, alpha {alpha:g}"
        heard = hearing.hear(edits, chosen, label, alpha=alpha, progress=progress) if chosen else None
        points.append(
            point(
                alpha, threshold, all_clips, known, unsure, heard.transcripts if heard is not None else None
            )
        )
    return points


def _to_hear(unsure: Sequence[CalibrationClip], clips: Sequence[CalibrationClip]) -> list[CalibrationClip]:
    """Those of `clips` that are unsure: the same ones at every alpha, as far as it goes; a few of a kind of
    which `clips` has none."""
    wanted = {(clip.set, clip.id) for clip in clips}
    chosen = []
    for is_speech in (True, False):
        mine = [clip for clip in unsure if clip.is_speech is is_speech]
        chosen += [clip for clip in mine if (clip.set, clip.id) in wanted] or evenly(mine, _LEAST)
    return chosen


def profiles(points: Sequence[Mapping[str, Any]], budget: float) -> dict[str, float]:
    """Alphas of the named points: "balanced" is 1; "gentle" the largest below it that costs no word (else
    the smallest); "strict" the largest above it whose WER stays within ten budgets by its interval and that
    empties at most 1 % of speech clips.
    """
    below = sorted(p["alpha"] for p in points if p["alpha"] < 1 and p["wer_rise_hi"] <= 0)
    smallest = min(p["alpha"] for p in points)
    above = [
        p["alpha"]
        for p in points
        if p["alpha"] > 1 and p["wer_rise_hi"] <= STRICT * budget and p["empty_speech"] <= STRICT_EMPTY
    ]
    return {
        "gentle": below[-1] if below else min(smallest, 1.0),
        "balanced": 1.0,
        "strict": max(above, default=1.0),
    }
