"""Methods that only judge what plain Whisper wrote: nothing is decoded again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
