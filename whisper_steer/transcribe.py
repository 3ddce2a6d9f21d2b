"""Audio to words, over any backend: the Transcript, its parts, and transcribe()."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper.utils import compression_ratio

from .audio import SAMPLING_RATE, check_audio, load_audio
from .backends import Progress, backend_for, make_backend
from .withholding import Stretch, Suppressed, merged
from .zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    import torch
    from whisper.model import Whisper

    from .steering import Steering
    from .stretches import GateVad

__all__ = ["Segment", "Suppressed", "Transcript", "Word", "transcribe"]


@dataclass(frozen=True)
class Word:
    """One word with its times in seconds and the probability (0..1) that the decoder gave it."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, as openai-whisper reports it.

    start, end: seconds. tokens: ids. temperature: the one it was decoded at. avg_logprob, compression_ratio,
    no_speech_prob: of the whole 30 s window that it comes from. seek: start of that window in mel frames of
    10 ms. words: None unless word_timestamps was asked for.
    """

    id: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    seek: int
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True)
class Transcript:
    """What was said, and what was withheld because nobody spoke.

    text: all segments' words. language: a code such as "en". duration: seconds of audio. suppressed: withheld
    windows in time order; what would have been written in them is known only with `decode_withheld`. model:
    its name. steering: name(s), None for plain Whisper. alpha: 0 for plain Whisper; None if several steerings
    with different alphas were at work. profile: the name that alpha was asked for by, None for a plain alpha.
    edited: stretches (start, end) in seconds, in time order, in which the encoder's stream was edited, in
    windows that keep their words. vad: what chose the stretches that were transcribed ("gate"), None: all of
    the recording was. What it left out is in `suppressed`, as LeftOut.
    """

    text: str
    segments: tuple[Segment, ...]
    language: str
    duration: float
    suppressed: tuple[Suppressed, ...]
    model: str
    steering: str | None
    alpha: float | None
    profile: str | None = None
    edited: tuple[Stretch, ...] = ()
    vad: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """openai-whisper's result dict ("text", "segments", "language"), plus "suppressed" and "edited":
        plain JSON types."""
        return {
            "text": self.text,
            "segments": [_segment_dict(segment) for segment in self.segments],
            "language": self.language,
            "suppressed": [dataclasses.asdict(window) for window in self.suppressed],
            "edited": [list(stretch) for stretch in self.edited],
        }

    def with_suppressed(self) -> Transcript:
        """The same with every withheld text among the segments, in time order, as plain Whisper would have
        it. Windows that were not decoded (no `decode_withheld`) have no text and stay out.

        Where the others have word timestamps, such a segment has one "word": its whole text.
        """
        by_word = any(segment.words is not None for segment in self.segments)
        shown = [_shown(window, by_word) for window in self.suppressed if window.text and window.text.strip()]
        merged = sorted([*self.segments, *shown], key=lambda segment: segment.start)
        segments = tuple(dataclasses.replace(segment, id=i) for i, segment in enumerate(merged))
        return dataclasses.replace(
            self, segments=segments, text="".join(segment.text for segment in segments)
        )


def transcribe(
    audio: str | Path | Any,
    model: str | Path | Whisper | Any = DEFAULT_MODEL,
    *,
    alpha: float | None = None,
    profile: str | None = None,
    steering: Steering | str | Path | None = None,
    decode_withheld: bool | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    download_root: str | Path | None = None,
    progress: Progress | None = None,
    vad: str | GateVad | None = None,
    **whisper_options: Any,
) -> Transcript:
    """Transcribe a file, or mono 16 kHz samples (n,) as an array or tensor.

    model: what load_model takes, or a loaded model (much cheaper for many files). alpha: 0 plain Whisper .. 1
    calibrated strength; None is 1, or what a model that is steered already has. profile: in its place, one of
    the steering's own strengths ("gentle", "balanced", "strict"). steering: a Steering, a file or a name;
    None is the one kept for the model. decode_withheld: decode withheld windows too, so that
    `Transcript.suppressed` has their words; None is False, or what the model's handle has. All four must be
    left out if the model is steered already.
    backend: "openai", "faster" or "transformers"; None: what suits the model (faster for CTranslate2's).
    device, download_root: see load_model. progress: called with (seconds done, seconds in all).
    vad: "gate" (or a GateVad with other thresholds): the steering's gate first looks for speech in the whole
    recording, which takes one more pass of the encoder; only the stretches that it finds are transcribed,
    each as a recording of its own. At alpha 0 that is all the steering does. None: everything is transcribed.
    whisper_options: those of whisper.transcribe (language, beam_size, temperature, word_timestamps, ...); for
    faster those of its own WhisperModel.transcribe, too.

    Raises AudioError, UsageError, MismatchError (no steering for this model), ModelError, FormatError.
    Safe to call from several threads, also with one model: calls on the same model take turns.
    """
    runtime = make_backend(
        backend or backend_for(model, download_root)[0],
        model,
        alpha=alpha,
        profile=profile,
        steering=steering,
        decode_withheld=decode_withheld,
        device=device,
        download_root=download_root,
        vad=vad,
    )
    samples = load_audio(audio) if isinstance(audio, (str, Path)) else check_audio(audio)
    try:
        result = runtime.transcribe(samples, whisper_options, progress)
    finally:
        runtime.close()
    by_word = bool(whisper_options.get("word_timestamps"))
    duration = len(samples) / SAMPLING_RATE
    return Transcript(
        text=result["text"],
        segments=tuple(_segment(segment, by_word) for segment in result["segments"]),
        language=result["language"],
        duration=duration,
        suppressed=tuple(result["suppressed"]),
        model=result["model"],
        steering=result["steering"],
        alpha=result["alpha"],
        profile=result["profile"],
        edited=merged([(0.0, duration)] if result["everywhere"] else result["edited"], duration),
        vad=None if vad is None else "gate",
    )


def _segment(segment: Mapping[str, Any], by_word: bool) -> Segment:
    """openai-whisper's segment dict. Only some of its segments have "words" when none were asked for, which
    its own subtitle writers trip over."""
    words = segment.get("words", ()) if by_word else None
    return Segment(
        id=segment["id"],
        start=float(segment["start"]),
        end=float(segment["end"]),
        text=segment["text"],
        tokens=tuple(segment["tokens"]),
        temperature=float(segment["temperature"]),
        avg_logprob=float(segment["avg_logprob"]),
        compression_ratio=float(segment["compression_ratio"]),
        no_speech_prob=float(segment["no_speech_prob"]),
        seek=int(segment["seek"]),
        words=None
        if words is None
        else tuple(
            Word(word["word"], float(word["start"]), float(word["end"]), float(word["probability"]))
            for word in words
        ),
    )


def _segment_dict(segment: Segment) -> dict[str, Any]:
    value = dataclasses.asdict(segment)
    value["tokens"] = list(segment.tokens)
    if segment.words is None:
        del value["words"]
    else:
        value["words"] = [dataclasses.asdict(word) for word in segment.words]
    return value


def _shown(window: Suppressed, by_word: bool) -> Segment:
    text, start, end = window.text or "", window.start or 0.0, window.end or 0.0
    return Segment(
        id=0,
        start=start,
        end=end,
        text=text if text.startswith(" ") else f" {text}",
        tokens=(),
        temperature=0.0,
        avg_logprob=float("nan") if window.avg_logprob is None else window.avg_logprob,
        compression_ratio=compression_ratio(text),
        no_speech_prob=float("nan") if window.no_speech_prob is None else window.no_speech_prob,
        seek=round(start * 100),
        words=(Word(f" {text.strip()}", start, end, 1.0 - window.score),) if by_word else None,
    )
