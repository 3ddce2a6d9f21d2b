"""Silero VAD in front of openai-whisper: only what it takes for speech is transcribed.

The VAD is the copy that faster-whisper brings along (an ONNX file, one thread), with faster-whisper's
defaults: a stretch of speech ends after 2 s without it, and is widened by 0.4 s on both sides. Each stretch
is transcribed as a recording of its own, and its times are moved to where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.methods import BEHIND_VAD, Heard, Method, Setup, Unavailable

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript

RATE = 16_000
GROUP = 8  # clips whose stretches are decoded together
DEFAULT_THRESHOLD = 0.5  # faster-whisper's
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
MISSING = "it needs Silero VAD as faster-whisper has it: pip install faster-whisper onnxruntime"


def check_vad() -> None:
    """Raises Unavailable if Silero VAD cannot be run here."""
    try:
        import faster_whisper.vad
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{MISSING} ({error.name} is missing)") from error
    faster_whisper.vad.get_vad_model()


def vad_version() -> str:
    """Of the package that the VAD comes with."""
    import faster_whisper

    return f"faster-whisper-{faster_whisper.__version__}"


def speech_stretches(audio: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> list[tuple[int, int]]:
    """(first, end) of what Silero VAD takes for speech, in samples of float32 (n,) at 16 kHz; in order, not
    overlapping. threshold: the least probability of speech, 0..1."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    audio = np.ascontiguousarray(audio, dtype=np.float32)
    found = get_speech_timestamps(audio, VadOptions(threshold=threshold))
    return [(int(stretch["start"]), int(stretch["end"])) for stretch in found]


def hear_behind_vad(
    model: Whisper, audios: Iterable[np.ndarray], threshold: float = DEFAULT_THRESHOLD
) -> Iterator[Heard]:
    """What `model` makes of the speech in each recording, 16 kHz: one Heard each, in order.

    Works on plain and on steered models. Options are the defaults of `whisper.transcribe`. Where the VAD
    finds no speech there are no words, and both label events are recognised non-speech; otherwise a label
    event happens if it happens in one of the stretches.
    """
    waiting = iter(audios)
    while group := list(islice(waiting, GROUP)):
        yield from _hear_group(model, group, threshold)


def _hear_group(model: Whisper, audios: Sequence[np.ndarray], threshold: float) -> list[Heard]:
    from calibration.decoding import transcribe_clips

    found, searching = [], []
    for audio in audios:
        began = time.perf_counter()
        found.append(speech_stretches(audio, threshold))
        searching.append(time.perf_counter() - began)
    began = time.perf_counter()
    cut = [
        audio[first:end] for audio, stretches in zip(audios, found, strict=True) for first, end in stretches
    ]
    transcripts = iter(transcribe_clips(model, cut, batch=GROUP))
    each = (time.perf_counter() - began) / max(1, len(cut))
    return [
        join(stretches, list(islice(transcripts, len(stretches))), seconds + each * len(stretches))
        for stretches, seconds in zip(found, searching, strict=True)
    ]


def join(
    stretches: Sequence[tuple[int, int]], transcripts: Sequence[ClipTranscript], seconds: float
) -> Heard:
    """The transcripts of stretches (first, end), in samples of the whole recording, as one. Times are kept
    within the stretch that they belong to. seconds: compute time."""
    segments = []
    for (first, end), transcript in zip(stretches, transcripts, strict=True):
        offset, limit = first / RATE, end / RATE
        for begins, ends, text in transcript.segments:
            segments.append((min(begins + offset, limit), min(ends + offset, limit), text))
    return Heard(
        text="".join(transcript.text for transcript in transcripts),
        segments=tuple(segments),
        nsp=any(transcript.nsp for transcript in transcripts),
        hr=any(transcript.hr for transcript in transcripts),
        seconds=seconds,
    )


@dataclass(frozen=True)
class SileroFirst:
    """See benchmarks.methods.Method; strength is the VAD's threshold."""

    name: str = "silero"
    strengths: tuple[float, ...] = THRESHOLDS
    quick_strengths: tuple[float, ...] = (0.5, 0.9)
    timed: str = BEHIND_VAD
    needs: tuple[str, ...] = ("faster_whisper", "onnxruntime")
    about: str = (
        "Silero VAD (v6, of faster-whisper) in front of openai-whisper, which hears only the speech that it "
        "finds; strength: the VAD's threshold, its default: 0.5"
    )

    def prepare(self, setup: Setup) -> None:
        check_vad()

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        return vad_version()

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        return hear_behind_vad(setup.model, (setup.audio(clip) for clip in clips), strength)


METHODS: tuple[Method, ...] = (SileroFirst(),)
