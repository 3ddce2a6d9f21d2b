"""Stretches of speech from how probable speech is in every 20 ms frame: plain arithmetic, no model.

The rules and the names of their parameters are those of Silero VAD and of faster-whisper's VadOptions, except
that a stretch which is too long is cut at its most silent frame. Where the probabilities come from:
speech_finder.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError
from .plaindata import set_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME_MS = 20  # an encoder frame
WINDOW_S = 30.0  # what Whisper hears at once

Frames = tuple[int, int]
"""First frame, and the one after the last."""


@dataclass(frozen=True)
class GateVad:
    """How the gate's frames become stretches of speech.

    threshold: probability of speech (0..1) from which on speech begins. neg_threshold: below it speech may
    end; None: threshold - 0.15, at least 0.01. min_silence_duration_ms: speech ends only in a silence of at
    least this length. min_speech_duration_ms: what is shorter is no speech. speech_pad_ms: added on both
    sides; where two stretches would overlap they share the gap. max_speech_duration_s: longer stretches
    (with what is added) are cut; at most 30, Whisper's window.
    window_s, overlap_s: the encoder hears windows of this length, neighbours have so much in common, so that
    no frame is judged without what is around it; window_s at most 30.

    The defaults were chosen for the bundled gate on calibration recordings that alternate between speech,
    music, noise and silence (benchmarks.long_recordings --split calibration): fewest words over non-speech
    at no more lost words than Silero VAD. The threshold is high because the gate is one-sided: a frame that
    is surely not speech is far above it.
    """

    threshold: float = 0.95
    neg_threshold: float | None = None
    min_speech_duration_ms: float = 0.0
    max_speech_duration_s: float = WINDOW_S
    min_silence_duration_ms: float = 1000.0
    speech_pad_ms: float = 400.0
    window_s: float = 10.0
    overlap_s: float = 2.0

    def __post_init__(self) -> None:
        for name in (
            "threshold",
            "min_speech_duration_ms",
            "max_speech_duration_s",
            "min_silence_duration_ms",
            "speech_pad_ms",
            "window_s",
            "overlap_s",
        ):
            set_number(self, name)
        if not 0 < self.threshold < 1:
            raise UsageError(f"vad has threshold {self.threshold:g}: expected a probability between 0 and 1")
        if self.neg_threshold is not None:
            set_number(self, "neg_threshold")
            if not 0 <= self.neg_threshold <= self.threshold:
                raise UsageError(
                    f"vad has neg_threshold {self.neg_threshold:g}: expected 0 to the threshold, "
                    f"{self.threshold:g}"
                )
        for name in ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"):
            if getattr(self, name) < 0:
                raise UsageError(f"vad has {name} {getattr(self, name):g}: expected milliseconds >= 0")
        for name in ("max_speech_duration_s", "window_s"):
            if not 1 <= getattr(self, name) <= WINDOW_S:
                raise UsageError(f"vad has {name} {getattr(self, name):g}: expected 1 to 30 seconds")
        if not 0 <= self.overlap_s <= self.window_s / 2:
            raise UsageError(
                f"vad has overlap_s {self.overlap_s:g}: expected 0 to half of window_s, {self.window_s / 2:g}"
            )

    @property
    def end_threshold(self) -> float:
        """neg_threshold, or what it is by default."""
        if self.neg_threshold is not None:
            return self.neg_threshold
        return min(max(self.threshold - 0.15, 0.01), self.threshold)


def speech_stretches(speech: NDArray[np.floating], options: GateVad) -> list[Frames]:
    """Stretches of speech, ascending; none overlaps another, none is longer than max_speech_duration_s.

    speech: (frames,), the probability (0..1) that somebody speaks. NaN counts as speech: what cannot be
    judged is not thrown away.
    """
    judged: NDArray[np.float64] = np.where(np.isnan(speech), 1.0, speech).astype(np.float64)
    runs = _joined(_runs(_speaking(judged, options)), _frames(options.min_silence_duration_ms))
    shortest = _frames(options.min_speech_duration_ms)
    runs = [(first, end) for first, end in runs if end - first >= shortest]
    longest = math.floor(options.max_speech_duration_s * 1000 / FRAME_MS)
    return [
        piece
        for run in _padded(runs, _frames(options.speech_pad_ms), len(judged))
        for piece in _pieces(run, judged, longest)
    ]


def gaps(stretches: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """What lies between ascending stretches, from 0 to `end`."""
    found = []
    reached = 0.0
    for first, last in [*stretches, (end, end)]:
        if first > reached:
            found.append((reached, first))
        reached = max(reached, last)
    return found


def _frames(milliseconds: float) -> int:
    return round(milliseconds / FRAME_MS)


def _speaking(speech: NDArray[np.float64], options: GateVad) -> NDArray[np.bool_]:
    """With hysteresis: from `threshold` on it is speech, below `end_threshold` it is not, in between what it
    was before (nothing, at the beginning)."""
    begins, ends = speech >= options.threshold, speech < options.end_threshold
    decided = np.maximum.accumulate(np.where(begins | ends, np.arange(len(speech)), -1))
    return np.where(decided >= 0, begins[decided], False)


def _runs(mask: NDArray[np.bool_]) -> list[Frames]:
    steps = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    firsts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return list(zip(firsts.tolist(), ends.tolist(), strict=True))


def _joined(runs: Sequence[Frames], silence: int) -> list[Frames]:
    """Runs with fewer than `silence` frames between them are one."""
    found: list[Frames] = []
    for first, end in runs:
        if found and first - found[-1][1] < silence:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return found


def _padded(runs: Sequence[Frames], pad: int, count: int) -> list[Frames]:
    """Wider by `pad` frames on both sides, within 0 .. count; a gap too small for both is shared."""
    found = []
    for place, (first, end) in enumerate(runs):
        before = first if place == 0 else first - runs[place - 1][1]
        after = count - end if place == len(runs) - 1 else runs[place + 1][0] - end
        # the left neighbour takes the odd frame
        left = min(pad, before if place == 0 else before // 2)
        right = min(pad, after if place == len(runs) - 1 else after - after // 2)
        found.append((first - left, end + right))
    return found


def _pieces(run: Frames, speech: NDArray[np.float64], longest: int) -> list[Frames]:
    """The run cut into pieces of at most `longest` frames, each time before the frame least like speech (the
    last of equals); no piece is shorter than a quarter of `longest`."""
    first, end = run
    found = []
    while end - first > longest:
        earliest, latest = first + longest // 2, min(first + longest, end - longest // 4)
        silence = speech[earliest : latest + 1][::-1]
        cut = latest - int(np.argmin(silence))
        found.append((first, cut))
        first = cut
    return [*found, (first, end)]
