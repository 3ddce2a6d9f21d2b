"""What a method made of a long recording: words where nobody spoke, and spoken words that are lost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

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
    """A normalised word at `time` (seconds), of a heard segment that lasts from `start` to `end`."""

    word: str
    time: float
    start: float
    end: float


def timed_words(heard: Sequence[tuple[float, float, str]]) -> list[TimedWord]:
    """The words of segments (start, end, text), spread evenly: word i of n at start + (i + 1/2) / n of it."""
    found = []
    for start, end, text in heard:
        words = normalise(text).split()
        for index, word in enumerate(words):
            found.append(TimedWord(word, start + (end - start) * (index + 0.5) / len(words), start, end))
    return found


def measure(recording: LongRecording, segments_heard: Sequence[tuple[float, float, str]]) -> LongCounts:
    """Counts of one recording. segments_heard: (start, end, text), seconds, in time order.

    A word is invented if its interpolated time lies more than 0.5 s from all speech, unless the alignment of
    the whole transcript matches it with a word that was spoken within its segment (whose times were then too
    wide). The others are aligned with the reference again, so that no invented word stands in for a lost one.
    """
    truth = [
        (word, segment) for segment in recording.speech for word in normalise(segment.text or "").split()
    ]
    words = timed_words(segments_heard)
    stretches = quiet_stretches(recording)
    matched = _matched(truth, words)
    outside = {
        index
        for index, word in enumerate(words)
        if index not in matched and not _near_speech(recording.speech, word.time)
    }
    invented = sum(_within(stretches, words[index].time) for index in outside)
    counts = (0, 0, 0)
    if all(segment.text for segment in recording.speech):
        kept = " ".join(word.word for index, word in enumerate(words) if index not in outside)
        counts = _errors(" ".join(word for word, _ in truth), kept)
    else:
        truth = []  # a part of the reference is not known
    minutes = sum(end - start for start, end in stretches) / 60
    return LongCounts(invented, minutes, len(truth), *counts)


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
    """Times after the end of the recording count as in a last stretch that reaches it."""
    if not stretches:
        return False
    place = bisect_right(stretches, (time, float("inf"))) - 1
    if place < 0:
        return False
    return time < stretches[place][1]


def _matched(truth: Sequence[tuple[str, LongSegment]], words: Sequence[TimedWord]) -> set[int]:
    """Words that are those of the reference, spoken while their segment lasts (or within the margin)."""
    if not truth or not words:
        return set()
    found = set()
    aligned = jiwer.process_words(" ".join(word for word, _ in truth), " ".join(word.word for word in words))
    for chunk in aligned.alignments[0]:
        if chunk.type == "equal":
            for offset in range(chunk.hyp_end_idx - chunk.hyp_start_idx):
                spoken = truth[chunk.ref_start_idx + offset][1]
                word = words[chunk.hyp_start_idx + offset]
                if word.start - MARGIN <= spoken.end and word.end + MARGIN >= spoken.start:
                    found.add(chunk.hyp_start_idx + offset)
    return found


def _errors(reference: str, hypothesis: str) -> tuple[int, int, int]:
    """(deletions, substitutions, insertions)."""
    if not reference:
        return 0, 0, len(hypothesis.split())
    if not hypothesis:
        return len(reference.split()), 0, 0
    result = jiwer.process_words(reference, hypothesis)
    return result.deletions, result.substitutions, result.insertions
