"""What a steering costs on clips of speech, against a budget: one definition for all who hold one.

The rise of the WER is over the words of sets that plain Whisper understands (all, if it understands none):
where it writes mostly wrong words, other wrong words mean nothing, and losing some looks like a gain. A share
of clips is held against the budget twice, among all clips and among those of understood sets, and the larger
one counts: a set that is not understood adds clips that can hardly lose a right word, and must not dilute the
others. Upper ends of 95 % intervals come from drawing groups of clips (speakers, source recordings) whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from calibration.evaluate import group_draws

if TYPE_CHECKING:
    from calibration.selection import CalibrationClip

UNDERSTOOD = 0.5  # plain WER up to which a set counts as understood
_DRAWS = 2000
_LEVEL = 0.975  # upper end of a 95 % interval


def understood_sets(clips: Sequence[CalibrationClip]) -> set[str]:
    """Names of the speech sets whose plain WER is at most UNDERSTOOD."""
    totals: dict[str, np.ndarray] = {}
    for clip in clips:
        plain = clip.errors(clip.transcript.text) if clip.is_speech else None
        if plain is not None:
            totals[clip.set] = totals.get(clip.set, np.zeros(2)) + (plain.words, plain.total)
    return {name for name, (words, errors) in totals.items() if errors <= UNDERSTOOD * words}


def share_upper_end(lost: int, clips: int) -> float:
    """Upper end of the 95 % bootstrap interval of lost / clips, all clips by themselves, without drawing: how
    many of the lost ones `clips` draws with replacement hold is binomial. 0 where nothing is lost."""
    from scipy.stats import binom

    return float(binom.ppf(_LEVEL, clips, lost / clips)) / clips if lost else 0.0


@lru_cache(maxsize=4)  # many thresholds are tried on the same clips
def _draws(groups: tuple[str, ...]) -> np.ndarray:
    return group_draws(groups, _DRAWS, 0)


def ratio_upper_end(top: np.ndarray, bottom: np.ndarray, groups: tuple[str, ...]) -> float:
    """Upper end of the 95 % interval of sum(top) / sum(bottom), both (clips,), groups drawn whole; 0 where
    top is 0 everywhere."""
    (hit,) = np.nonzero(top)
    if not len(hit):
        return 0.0
    draws = _draws(groups)
    return float(np.quantile((draws[:, hit] @ top[hit]) / np.maximum(draws @ bottom, 1), _LEVEL))


class SpeechCosts:
    """Clips of speech, counted once, against which any number of transcripts can be held.

    Attributes:
        clips: those of speech, in order. words, plain: (clips,) of the reference, and plain Whisper's errors;
            0 where the reference has no word. understood: (clips,) bool, of a set that plain Whisper
            understands; all, if it understands none.
    """

    def __init__(self, clips: Sequence[CalibrationClip]):
        self.clips = [clip for clip in clips if clip.is_speech]
        counted = [clip.errors(clip.transcript.text) for clip in self.clips]
        self.words = np.array([0 if one is None else one.words for one in counted], dtype=np.float64)
        self.plain = np.array([0 if one is None else one.total for one in counted], dtype=np.float64)
        known = understood_sets(self.clips)
        self.understood = np.array([clip.set in known for clip in self.clips], dtype=bool)
        if not known:
            self.understood[:] = True
        self._groups = tuple(clip.group for clip in self.clips)
        self._understood_groups = tuple(
            group for group, known in zip(self._groups, self.understood, strict=True) if known
        )

    def errors(self, texts: Sequence[str]) -> np.ndarray:
        """(clips,) word errors of their texts; 0 where the reference has no word."""
        counted = [clip.errors(text) for clip, text in zip(self.clips, texts, strict=True)]
        return np.array([0 if one is None else one.total for one in counted], dtype=np.float64)

    def rise_value(self, change: np.ndarray) -> float:
        """Of the WER, absolute. change: (clips,) errors above plain's."""
        return float(change[self.understood].sum() / max(self.words[self.understood].sum(), 1.0))

    def rise(self, change: np.ndarray) -> tuple[float, float]:
        """Of the WER, absolute, and the upper end of its interval. change: (clips,) errors above plain's."""
        counted, words = change[self.understood], self.words[self.understood]
        return self.rise_value(change), ratio_upper_end(counted, words, self._understood_groups)

    def set_rise(self, change: np.ndarray) -> float:
        """Of the WER in the understood set where it rises most, absolute. change: (clips,) errors above
        plain's."""
        rises = [0.0]
        for name in {clip.set for clip, known in zip(self.clips, self.understood, strict=True) if known}:
            mine = np.array([clip.set == name for clip in self.clips])
            rises.append(float(change[mine].sum() / max(self.words[mine].sum(), 1.0)))
        return max(rises)

    def share_hi(
        self, events: np.ndarray, more: np.ndarray | None = None, more_groups: tuple[str, ...] = ()
    ) -> float:
        """Upper end of the interval of the share of clips for which `events` (clips,) is true: among all or
        among those of understood sets, the larger one. more: (n,) bool of further clips, which count among
        all, of `more_groups`."""
        everything = events if more is None else np.concatenate([events, more])
        return max(
            _share_end(everything, (*self._groups, *more_groups)),
            _share_end(events[self.understood], self._understood_groups),
        )


def _share_end(events: np.ndarray, groups: tuple[str, ...]) -> float:
    if len(set(groups)) == len(groups):
        return share_upper_end(int(events.sum()), len(events))
    return ratio_upper_end(events.astype(np.float64), np.ones(len(events)), groups)
