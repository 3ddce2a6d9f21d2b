"""Words invented and words lost on long recordings in which speech, silence, music and noise alternate."""

from __future__ import annotations

from benchmarks.long_measure import LongCounts, measure
from benchmarks.long_truth import LongRecording, LongSegment, long_recordings, spliced_recordings

__all__ = [
    "LongCounts",
    "LongRecording",
    "LongSegment",
    "long_recordings",
    "measure",
    "spliced_recordings",
]
