"""Methods that only judge what plain Whisper wrote: nothing is decoded again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.methods import Heard, Setup
from benchmarks.peers.intervention import heard_of

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript

GROUP = 64  # clips whose transcripts are asked for together


def judge(
    setup: Setup, clips: Sequence[Clip], judged: Callable[[Clip, ClipTranscript], ClipTranscript]
) -> Iterator[Heard]:
    """What is left of plain Whisper's transcripts; the time is that of plain Whisper and of judging."""
    for start in range(0, len(clips), GROUP):
        group = clips[start : start + GROUP]
        heard, transcripts = setup.plain(group), setup.plain_windows(group)
        for clip, before, transcript in zip(group, heard, transcripts, strict=True):
            began = time.perf_counter()
            after = judged(clip, transcript)
            yield heard_of(after, before.seconds + time.perf_counter() - began)


@dataclass(frozen=True)
class Scored:
    """windows: score of every decoded window of a clip. seconds: of encoding and judging them."""

    windows: tuple[float, ...]
    seconds: float


def judge_windows(
    setup: Setup,
    clips: Sequence[Clip],
    scores: Callable[[Sequence[Clip]], Mapping[Clip, Scored]],
    withheld: Callable[[float], bool],
) -> Iterator[Heard]:
    """What is left of plain Whisper's transcripts without the windows whose score says so. A clip of which
    none is left was encoded and judged, never decoded: that is its time."""
    from calibration.decoding import withhold

    for start in range(0, len(clips), GROUP):
        group = clips[start : start + GROUP]
        scored = scores(group)

        def judged(
            clip: Clip, transcript: ClipTranscript, scored: Mapping[Clip, Scored] = scored
        ) -> ClipTranscript:
            return withhold(transcript, [withheld(score) for score in scored[clip].windows])

        for clip, heard in zip(group, judge(setup, group, judged), strict=True):
            one = scored[clip]
            yield replace(heard, seconds=one.seconds) if all(map(withheld, one.windows)) else heard
