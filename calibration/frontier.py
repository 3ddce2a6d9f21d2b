"""The frontier of a steering: what every alpha costs in words and saves in invented ones, and named points
on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.evaluate import nonspeech_metrics, normalise
from calibration.gated_hearing import GatedHearing
from calibration.hearing import Heard
from calibration.selection import CalibrationClip
from whisper_steer.steering import Edit, MeanAblation

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
STRICT = 10.0  # the strict profile's budget, in units of the calibration's
STRICT_EMPTY = 0.01  # share of speech clips that the strict profile may leave without a word
PROFILES = ("gentle", "balanced", "strict")

Point = dict[str, Any]


def point(alpha: float, threshold: float | None, clips: Sequence[CalibrationClip], heard: Heard) -> Point:
    """One point of the frontier, rates as fractions with their 95 % bootstrap intervals."""
    speech = [clip for clip in clips if clip.is_speech]
    others = [clip for clip in clips if not clip.is_speech]
    outcomes = [heard.transcripts[clip.set, clip.id].outcome() for clip in others]
    rate = nonspeech_metrics(outcomes).text_fpr if outcomes else None
    emptied = [
        bool(normalise(clip.transcript.text)) and not normalise(heard.transcripts[clip.set, clip.id].text)
        for clip in speech
    ]
    return {
        "alpha": alpha,
        "threshold": threshold,
        "text_fpr": float(rate.value) if rate is not None else float("nan"),
        "text_fpr_lo": float(rate.lo) if rate is not None else float("nan"),
        "text_fpr_hi": float(rate.hi) if rate is not None else float("nan"),
        "wer_rise": heard.rise,
        "wer_rise_hi": heard.rise_hi,
        "empty_speech": float(np.mean(emptied)) if emptied else float("nan"),
        "clips": len(clips),
    }


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
    """Points at `alphas`, measured on `clips`; the one at alpha 1 is `at_one`, on `all_clips`.

    Above alpha 1 the threshold decides which clips keep words, and that is known of all clips: their rates
    are of `at_one` with the further windows left out. Silence (MeanAblation at full strength) does not change
    above alpha 1 either, so nothing at all is decoded again; with other edits the WER is heard on `clips`.
    """
    saturated = all(isinstance(edit, MeanAblation) and edit.strength >= 1 for edit in edits)
    points = []
    for alpha in alphas:
        threshold = hearing.gate.window_threshold(alpha)
        if alpha == 1.0:
            points.append(point(1.0, threshold, all_clips, at_one))
            continue
        tightened = None
        if alpha > 1:
            heard = hearing.tightened(at_one, all_clips, alpha)
            tightened = point(alpha, threshold, all_clips, heard)
        if tightened is None or not saturated:
            heard = hearing.hear(edits, clips, f"frontier, alpha {alpha:g}", alpha=alpha, progress=progress)
            found = point(alpha, threshold, clips, heard)
            if tightened is not None:  # whichever is dearer
                dearer = max(found, tightened, key=lambda one: float(one["wer_rise_hi"]))
                tightened |= {name: dearer[name] for name in ("wer_rise", "wer_rise_hi")}
        points.append(found if tightened is None else tightened)
    return points


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
