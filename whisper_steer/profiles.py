"""Named strengths of a steering, and the measured frontier that they are points of.

Both are kept in a steering file's metadata: "profiles" {"gentle": 0.6, ...} (name -> alpha) and "frontier", a
list of points as FrontierPoint has them. `whisper-steer calibrate` writes them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from .errors import UsageError

USUAL = ("gentle", "balanced", "strict")  # what a calibration calls its profiles
_COUNTS = ("nonspeech_clips", "speech_clips", "unheard_clips")
_SAME = 1e-6  # relative difference of two alphas that mean the same


@dataclass(frozen=True)
class FrontierPoint:
    """What was measured at one alpha, on the validation split of the calibration. Fractions, not percent.

    threshold: window logit above which a window was withheld; None without a gate. text_fpr: share of
    non-speech clips that keep words, with its interval (lo, hi). wer_rise: WER above plain Whisper's, and the
    upper end of its interval. empty_speech: share of speech clips left without a word. nonspeech_clips,
    speech_clips: that the rates are of; unheard_clips: those of them that an edit may change at this alpha
    and that were not heard, clips like them that were stand for them. What was not measured is None.
    """

    alpha: float
    threshold: float | None = None
    text_fpr: float | None = None
    text_fpr_lo: float | None = None
    text_fpr_hi: float | None = None
    wer_rise: float | None = None
    wer_rise_hi: float | None = None
    empty_speech: float | None = None
    nonspeech_clips: int | None = None
    speech_clips: int | None = None
    unheard_clips: int | None = None

    def summary(self) -> str:
        """The rates in one line for a person; "" if none was measured."""
        fpr, wer = self.text_fpr, self.wer_rise
        parts = []
        if fpr is not None:
            interval = ""
            if self.text_fpr_lo is not None and self.text_fpr_hi is not None:
                interval = f" [{100 * self.text_fpr_lo:.1f}, {100 * self.text_fpr_hi:.1f}]"
            clips = "" if self.nonspeech_clips is None else f"{self.nonspeech_clips} "
            parts.append(f"words over {100 * fpr:.1f} %{interval} of {clips}non-speech clips")
        if wer is not None:
            upper = "" if self.wer_rise_hi is None else f" (at most {100 * self.wer_rise_hi:+.2f})"
            parts.append(f"WER {100 * wer:+.2f}{upper} points")
        if self.empty_speech is not None:
            clips = "" if self.speech_clips is None else f"{self.speech_clips} "
            parts.append(f"{100 * self.empty_speech:.1f} % of {clips}speech clips empty")
        return ", ".join(parts)


def read_profiles(metadata: Mapping[str, Any]) -> Mapping[str, float]:
    """name -> alpha in ascending order of alpha, read-only; empty if there are none. Raises UsageError."""
    given = metadata.get("profiles") or {}
    if not isinstance(given, Mapping):
        raise UsageError(f"profiles is a {type(given).__name__}: expected names with an alpha each")
    for name, alpha in given.items():
        if not isinstance(name, str) or not name or not _is_number(alpha) or alpha < 0:
            raise UsageError(f"profile {name!r} has alpha {alpha!r}: expected a name and a number >= 0")
    ordered = sorted(given.items(), key=lambda item: float(item[1]))
    return MappingProxyType({name: float(alpha) for name, alpha in ordered})


def read_frontier(metadata: Mapping[str, Any]) -> tuple[FrontierPoint, ...]:
    """The frontier's points in ascending order of alpha; keys that are not known here are left out. Raises
    UsageError."""
    given = metadata.get("frontier") or []
    if not isinstance(given, (list, tuple)) or not all(isinstance(point, Mapping) for point in given):
        raise UsageError("frontier is no list of points: expected one mapping with an alpha per point")
    names = [field.name for field in fields(FrontierPoint)]
    points = []
    for number, point in enumerate(given):
        values = {name: point[name] for name in names if point.get(name) is not None}
        wrong = next((name for name, value in values.items() if not _is_number(value)), None)
        if wrong is not None or "alpha" not in values:
            name = wrong or "alpha"
            raise UsageError(f"frontier point {number} has {name} {point.get(name)!r}: expected a number")
        points.append(
            FrontierPoint(
                **{name: int(v) if name in _COUNTS else float(v) for name, v in values.items()}  # type: ignore[arg-type]
            )
        )
    return tuple(sorted(points, key=lambda point: point.alpha))


def point_at(frontier: tuple[FrontierPoint, ...], alpha: float) -> FrontierPoint | None:
    """The point that was measured at this alpha, if one was."""
    return next((p for p in frontier if math.isclose(p.alpha, alpha, rel_tol=_SAME)), None)


def alpha_of(profiles: Mapping[str, float], profile: Any, owner: str, model: str | None) -> float:
    """The alpha of a profile. owner, model: names of the steering and its model, for the message.

    Raises UsageError: there is no such profile, or there is none at all.
    """
    if not profiles:
        raise UsageError(
            f"steering {owner} has no profiles: pass alpha instead, or make a steering that has them: "
            f"whisper-steer calibrate --model {model or 'NAME'} --nonspeech DIR --speech MANIFEST --out FILE"
        )
    if profile not in profiles:
        raise UsageError(f"profile is {profile!r}: steering {owner} has {', '.join(profiles)}")
    return profiles[profile]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
