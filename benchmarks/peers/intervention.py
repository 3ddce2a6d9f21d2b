"""Decodes clips while something is done to the model; it is plain again whenever a result is handed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.availability import CALIBRATION
from benchmarks.methods import Heard, Setup

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript
    from whisper_steer.edits import Edit

GROUP = 8  # clips decoded together


def heard_of(transcript: ClipTranscript, seconds: float) -> Heard:
    """The transcript as a method's result; seconds: compute time."""
    return Heard(transcript.text, transcript.segments, transcript.nsp, transcript.hr, seconds)


def label_events(scores: Iterable[tuple[float, float]]) -> tuple[bool, bool]:
    """(nsp, hr) of windows or segments, each (no_speech_prob, avg_logprob); none: recognised non-speech."""
    from calibration.evaluate import counts_as_speech_nsp, escapes_skip_rule

    known = list(scores)
    return any(counts_as_speech_nsp(p) for p, _ in known), any(escapes_skip_rule(*one) for one in known)


def hear_under(
    setup: Setup, clips: Sequence[Clip], intervention: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Heard]:
    """One result per clip, in order, with `whisper.transcribe`'s default options under the intervention.

    It is entered for every group of 8 clips and left before their results are handed out, so that the model
    is plain between two results, also when the caller stops early. A group's compute time is shared by its
    clips.
    """
    from calibration.decoding import iterate_transcripts

    for start in range(0, len(clips), GROUP):
        audios = [setup.audio(clip) for clip in clips[start : start + GROUP]]
        with intervention():
            began = time.perf_counter()
            transcripts = list(iterate_transcripts(setup.model, audios, batch=GROUP))
            each = (time.perf_counter() - began) / len(audios)
        for transcript in transcripts:
            yield heard_of(transcript, each)


@dataclass(frozen=True)
class EditMethod:
    """A Method that edits the encoder by one constant rule, fitted once: see benchmarks.methods.Method.

    edit: the edit for a setup; its strength is replaced by the method's. quick_strengths: of a quick run.
    """

    name: str
    strengths: tuple[float, ...]
    quick_strengths: tuple[float, ...]
    about: str
    edit: Callable[[Setup], Edit]
    needs: tuple[str, ...] = (CALIBRATION,)

    def prepare(self, setup: Setup) -> None:
        self.fitted(setup)

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        from whisper_steer.attach import steer
        from whisper_steer.steering import Steering

        steering = Steering((replace(self.fitted(setup), strength=strength),))
        return hear_under(setup, clips, lambda: steer(setup.model, alpha=1.0, steering=steering))

    def fitted(self, setup: Setup) -> Edit:
        """The edit at strength 1, kept in setup.memory. Raises Unavailable."""
        key = f"edit of {self.name}"
        if key not in setup.memory:
            setup.memory[key] = self.edit(setup)
        edit: Edit = setup.memory[key]
        return edit
