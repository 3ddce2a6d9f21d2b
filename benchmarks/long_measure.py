"""What a method made of a long recording: words where nobody spoke, and spoken words that are lost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from benchmarks.long_truth import LongRecording, LongSegment
from calibration.evaluate import normalise

MARGIN = 0.5  # seconds around speech that count as speech: no runtime's times are exact


@dataclass(frozen=True)
class LongCounts:
    """Counts of one recording, or sums over several (`+`).

    invented: words in stretches without speech. minutes: of those stretches, less a margin of 0.5 s around
    speech. words: of the reference, where it is known. lost, substituted: of these, those without a match, or
    with another word in its place. inserted: words too many, near speech.
    """

    invented: int
    minutes: float
    words: int
    lost: int
    substituted: int
    inserted: int

    def __add__(self, other: LongCounts) -> LongCounts:
        return LongCounts(
            self.invented + other.invented,
            self.minutes + other.minutes,
            self.words + other.words,
            self.lost + other.lost,
            self.substituted + other.substituted,
            self.inserted + other.inserted,
        )


@dataclass(frozen=True)
class TimedWord:
    """A normalised word at `time` (seconds), of segment number `segment`, which lasts from `start` to
    `end`."""

    word: str
    time: float
    segment: int
    start: float
    end: float


def spread(segments: Sequence[tuple[float, float, str]]) -> list[TimedWord]:
    """The words of segments (start, end, text): word i of n at start + (i + 1/2) / n of the length."""
    found = []
    for number, (start, end, text) in enumerate(segments):
        words = normalise(text).split()
        for index, word in enumerate(words):
            time = start + (end - start) * (index + 0.5) / len(words)
            found.append(TimedWord(word, time, number, start, end))
    return found


def measure(recording: LongRecording, segments_heard: Sequence[tuple[float, float, str]]) -> LongCounts:
    """Counts of one recording. segments_heard: (start, end, text), seconds, in time order.

    A word is invented if its time lies more than 0.5 s from all speech; see `word_times`. The others are
    aligned with the reference again, so that no invented word stands in for a lost one.
    """
    truth = spread([(segment.start, segment.end, segment.text or "") for segment in recording.speech])
    end = recording.seconds  # Whisper's last segment may end with its window, after the audio
    words = spread([(min(first, end), min(last, end), text) for first, last, text in segments_heard])
    times = word_times(truth, words)
    stretches = quiet_stretches(recording)
    invented = sum(_within(stretches, time) for time in times)
    minutes = sum(end - start for start, end in stretches) / 60
    if not all(segment.text for segment in recording.speech):  # a part of the reference is not known
        return LongCounts(invented, minutes, 0, 0, 0, 0)
    kept = [
        word.word for word, time in zip(words, times, strict=True) if _near_speech(recording.speech, time)
    ]
    counts = _errors(" ".join(word.word for word in truth), " ".join(kept))
    return LongCounts(invented, minutes, len(truth), *counts)


def word_times(truth: Sequence[TimedWord], heard: Sequence[TimedWord]) -> list[float]:
    """When the heard words were written down, in seconds, one each.

    Whisper's segments often begin in the silence before their speech, so spreading alone would place
    recognised words there. Both transcripts are aligned first: a word that is that of the reference takes its
    time if it was spoken while the heard segment lasts, and so do words in the place of others between the
    same two segments. The rest is interpolated between these and its segment's ends.
    """
    times = [word.time for word in heard]
    anchors = _anchors(truth, heard)
    place = 0
    while place < len(heard):
        segment = heard[place].segment
        last = place
        while last < len(heard) and heard[last].segment == segment:
            last += 1
        known = [(index + 0.5, anchors[index]) for index in range(place, last) if index in anchors]
        if known:
            points = [(float(place), heard[place].start), *known, (float(last), heard[place].end)]
            middles = np.arange(place, last) + 0.5
            where, when = np.array(points).T
            times[place:last] = np.interp(middles, where, when).tolist()
        place = last
    return times


def _anchors(truth: Sequence[TimedWord], heard: Sequence[TimedWord]) -> dict[int, float]:
    """Heard word -> time of the spoken word that it stands for, within its segment's length."""
    if not truth or not heard:
        return {}
    aligned = jiwer.process_words(
        " ".join(word.word for word in truth), " ".join(word.word for word in heard)
    )
    pairs = [
        (chunk.hyp_start_idx + offset, chunk.ref_start_idx + offset, chunk.type == "equal")
        for chunk in aligned.alignments[0]
        if chunk.type in ("equal", "substitute")
        for offset in range(chunk.hyp_end_idx - chunk.hyp_start_idx)
    ]
    near = [
        (ours, theirs, equal)
        for ours, theirs, equal in pairs
        if heard[ours].start - MARGIN <= truth[theirs].time <= heard[ours].end + MARGIN
    ]
    recognised = {(heard[ours].segment, truth[theirs].segment) for ours, theirs, equal in near if equal}
    return {
        ours: min(max(truth[theirs].time, heard[ours].start), heard[ours].end)
        for ours, theirs, _ in near
        if (heard[ours].segment, truth[theirs].segment) in recognised
    }


def quiet_stretches(recording: LongRecording) -> list[tuple[float, float]]:
    """(start, end) of what is measured as non-speech: all that is more than 0.5 s from speech, less segments
    that are not measured."""
    taken = [(segment.start - MARGIN, segment.end + MARGIN) for segment in recording.speech]
    taken += [(segment.start, segment.end) for segment in recording.segments if not segment.measured]
    free = []
    position = 0.0
    for start, end in [*sorted(taken), (recording.seconds, recording.seconds)]:
        if start > position:
            free.append((position, start))
        position = max(position, end)
    return free


def _near_speech(speech: Sequence[LongSegment], time: float) -> bool:
    return any(segment.start - MARGIN <= time <= segment.end + MARGIN for segment in speech)


def _within(stretches: Sequence[tuple[float, float]], time: float) -> bool:
    place = bisect_right(stretches, (time, float("inf"))) - 1
    return place >= 0 and time <= stretches[place][1]


def _errors(reference: str, hypothesis: str) -> tuple[int, int, int]:
    """(deletions, substitutions, insertions)."""
    if not reference:
        return 0, 0, len(hypothesis.split())
    if not hypothesis:
        return len(reference.split()), 0, 0
    result = jiwer.process_words(reference, hypothesis)
    return result.deletions, result.substitutions, result.insertions
