"""Many clips through `whisper.transcribe`, with the first greedy pass batched over clips.

The transcripts are those of `whisper.transcribe(model, audio)` with default options: the real function runs
on every clip. Only its calls of `model.decode` are answered from a batch computed beforehand where they ask
for the same window at temperature 0 without a prompt; a fallback at a higher temperature reuses the batch's
encoder output. Works on plain and on steered models (see whisper_steer.attach): whatever `model.decode`
does happens in the batch too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import whisper
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FRAMES, SAMPLE_RATE
from whisper.decoding import DecodingOptions, DecodingResult

from calibration.activations import cut_window, padded_log_mel
from calibration.evaluate import Outcome, counts_as_speech_nsp, escapes_skip_rule

if TYPE_CHECKING:
    from whisper.model import Whisper


@dataclass(frozen=True)
class DecodedWindow:
    """One window that `whisper.transcribe` looked at.

    Attributes:
        seek: its start in mel frames of 10 ms.
        size: its mel frames with content (at most 3000).
        text: what the transcript kept of it; empty if the skip rule dropped it.
        no_speech_prob, avg_logprob, temperature: of the decoding attempt that was accepted.
    """

    seek: int
    size: int
    text: str
    no_speech_prob: float
    avg_logprob: float
    temperature: float


@dataclass(frozen=True)
class ClipTranscript:
    """Transcript of one clip.

    Attributes:
        text: as `whisper.transcribe` returns it.
        windows: every window it looked at, in time order.
        greedy: (no_speech_prob, avg_logprob) of the consecutive 30 s windows at temperature 0: the papers'
            setting.
        seconds: length of the clip.
        segments: (start, end, text) of what the transcript holds, seconds, in time order; those without text
            are left out.
    """

    text: str
    windows: tuple[DecodedWindow, ...]
    greedy: tuple[tuple[float, float], ...]
    seconds: float
    segments: tuple[tuple[float, float, str], ...] = ()

    @property
    def no_speech_prob(self) -> float:
        """Lowest of the 30 s windows: the one most like speech."""
        return min(p for p, _ in self.greedy)

    @property
    def avg_logprob(self) -> float:
        """Highest of the 30 s windows: the most confident one."""
        return max(logprob for _, logprob in self.greedy)

    @property
    def nsp(self) -> bool:
        return any(counts_as_speech_nsp(p) for p, _ in self.greedy)

    @property
    def hr(self) -> bool:
        return any(escapes_skip_rule(p, logprob) for p, logprob in self.greedy)

    def outcome(self, language: str = "en") -> Outcome:
        """The clip as a non-speech observation for `calibration.evaluate`; language: of its text."""
        return Outcome(self.text, self.nsp, self.hr, self.seconds, language)


@dataclass
class _Prefetched:
    """One clip's consecutive windows and their results at temperature 0."""

    mel: Tensor
    content_frames: int
    windows: list[Tensor]
    results: list[DecodingResult] = field(default_factory=list)


class _AnsweringModel:
    """Stands in for the model inside `whisper.transcribe`: answers `decode` from the batch where it can,
    and notes every window with the result that was accepted last.
    """

    def __init__(self, model: Whisper, prefetched: _Prefetched):
        self._model = model
        self._prefetched = prefetched
        self._asked: Tensor | None = None
        self.seen: list[tuple[Tensor, DecodingResult]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, mel: Tensor, options: DecodingOptions) -> DecodingResult:
        result = self._answer(mel, options)
        if mel is self._asked:  # the same window again, at a higher temperature
            self.seen[-1] = (mel, result)
        else:
            self.seen.append((mel, result))
            self._asked = mel
        return result

    def _answer(self, mel: Tensor, options: DecodingOptions) -> DecodingResult:
        for window, result in zip(self._prefetched.windows, self._prefetched.results, strict=True):
            if torch.equal(mel, window.to(mel)):
                if options.temperature == 0 and not options.prompt:
                    return result
                return _single(self._model.decode(result.audio_features, options))
        return _single(self._model.decode(mel, options))


def _single(result: DecodingResult | list[DecodingResult]) -> DecodingResult:
    return result[0] if isinstance(result, list) else result


def default_options(model: Whisper, language: str = "en") -> DecodingOptions:
    """The options of `whisper.transcribe`'s first attempt at a window."""
    return DecodingOptions(language=language, temperature=0.0, fp16=model.device.type != "cpu")


def greedy_decode(model: Whisper, mels: Tensor, language: str = "en") -> list[DecodingResult]:
    """Greedy results for windows (batch, n_mels, 3000), or for encoded features (batch, 1500, d_model)."""
    options = default_options(model, language)
    dtype = torch.float16 if options.fp16 else torch.float32
    results = model.decode(mels.to(model.device, dtype), options)
    return results if isinstance(results, list) else [results]


def transcribe_clips(
    model: Whisper, audios: Sequence[np.ndarray], *, batch: int = 8, language: str = "en"
) -> list[ClipTranscript]:
    """Transcripts of 16 kHz clips, default options of `whisper.transcribe`; sampling is seeded by each
    clip's audio.
    """
    return list(iterate_transcripts(model, audios, batch=batch, language=language))


def iterate_transcripts(
    model: Whisper,
    audios: Iterable[np.ndarray],
    *,
    batch: int = 8,
    language: str = "en",
    options: Mapping[str, Any] | None = None,
) -> Iterator[ClipTranscript]:
    """Like `transcribe_clips`, one group of `batch` clips in memory at a time.

    options: further ones of `whisper.transcribe` that do not concern the first greedy pass, such as its
    thresholds.
    """
    group: list[np.ndarray] = []
    for audio in audios:
        group.append(np.ascontiguousarray(audio, dtype=np.float32))
        if len(group) == batch:
            yield from _transcribe_group(model, group, language, options or {})
            group = []
    if group:
        yield from _transcribe_group(model, group, language, options or {})


def _transcribe_group(
    model: Whisper, audios: list[np.ndarray], language: str, options: Mapping[str, Any]
) -> Iterator[ClipTranscript]:
    clips: list[_Prefetched] = []
    for audio in audios:
        mel, content = padded_log_mel(audio, model.dims.n_mels)
        windows = [cut_window(mel, content, seek) for seek in range(0, max(content, 1), N_FRAMES)]
        clips.append(_Prefetched(mel, content, windows))
    mels = torch.stack([window for clip in clips for window in clip.windows])
    results: list[DecodingResult] = []
    for start in range(0, len(mels), len(audios)):  # long clips do not make the batch grow
        results += greedy_decode(model, mels[start : start + len(audios)], language)
    for clip in clips:
        clip.results, results = results[: len(clip.windows)], results[len(clip.windows) :]
    for audio, clip in zip(audios, clips, strict=True):
        yield _transcribe_one(model, audio, clip, language, options)


def _transcribe_one(
    model: Whisper, audio: np.ndarray, clip: _Prefetched, language: str, options: Mapping[str, Any]
) -> ClipTranscript:
    stand_in = _AnsweringModel(model, clip)
    fp16 = model.device.type != "cpu"
    with torch.random.fork_rng(devices=[] if not fp16 else None):
        torch.manual_seed(
            zlib.crc32(audio.tobytes())
        )  # sampling at higher temperatures repeats with the audio
        result = whisper.transcribe(
            stand_in,  # type: ignore[arg-type]
            audio,
            language=language,
            fp16=fp16,
            **options,
        )
    texts: dict[int, str] = {}
    for segment in result["segments"]:
        texts[segment["seek"]] = texts.get(segment["seek"], "") + segment["text"]
    windows: list[DecodedWindow] = []
    start = 0
    for mel, decoded in stand_in.seen:
        seek = _find_window(clip, mel, start)
        size = min(N_FRAMES, clip.content_frames - seek)
        windows.append(
            DecodedWindow(
                seek,
                size,
                texts.get(seek, ""),
                float(decoded.no_speech_prob),
                float(decoded.avg_logprob),
                float(decoded.temperature),
            )
        )
        start = seek + 1
    return ClipTranscript(
        text=result["text"],
        windows=tuple(windows),
        greedy=tuple((float(r.no_speech_prob), float(r.avg_logprob)) for r in clip.results),
        seconds=len(audio) / SAMPLE_RATE,
        segments=tuple(
            (float(segment["start"]), float(segment["end"]), segment["text"])
            for segment in result["segments"]
            if segment["text"].strip()
        ),
    )


def _find_window(clip: _Prefetched, window: Tensor, start: int) -> int:
    """Mel frame at which `window` was cut from the clip, not before `start`."""
    # on a GPU windows are float16: the clip is rounded as they were
    window, mel = window.to(clip.mel.device), clip.mel.to(window.dtype)
    candidates = (mel[:, start : clip.content_frames] == window[:, :1]).all(dim=0).nonzero().flatten()
    for candidate in (candidates + start).tolist():
        if torch.equal(cut_window(mel, clip.content_frames, candidate), window):
            return int(candidate)
    raise RuntimeError("a window that was decoded is not a slice of its clip's spectrogram")


def withhold(transcript: ClipTranscript, withheld: Sequence[bool]) -> ClipTranscript:
    """The transcript that would have come out if some of its windows had been withheld, without decoding
    again.

    A withheld window gives no text, counts as recognised non-speech, and `whisper.transcribe` jumps to its
    end: later windows that began inside it are not visited. Exact for clips of up to 30 s; for longer ones
    the windows after a withheld one are taken where the plain run had them.
    """
    if len(withheld) != len(transcript.windows):
        raise ValueError(f"{len(withheld)} decisions for {len(transcript.windows)} windows")
    kept: list[DecodedWindow] = []
    resume = 0
    for window, drop in zip(transcript.windows, withheld, strict=True):
        if window.seek < resume:
            continue
        if drop:
            resume = window.seek + window.size
            window = replace(window, text="", no_speech_prob=1.0, avg_logprob=-100.0)
        kept.append(window)
    dropped = {window.seek for window in kept if window.avg_logprob == -100.0}
    greedy = tuple(
        (1.0, -100.0) if index * N_FRAMES in dropped else score
        for index, score in enumerate(transcript.greedy)
    )
    spoken = {window.seek for window in kept} - dropped
    segments = tuple(
        segment for segment in transcript.segments if _window_of(segment[0], transcript.windows) in spoken
    )
    text = "".join(window.text for window in kept)
    return replace(transcript, text=text, windows=tuple(kept), greedy=greedy, segments=segments)


def _window_of(start: float, windows: Sequence[DecodedWindow]) -> int:
    """Seek of the window that a segment beginning at `start` seconds came from: the last one before it."""
    frame = start * SAMPLE_RATE / HOP_LENGTH + 0.5
    return max(window.seek for window in windows if window.seek <= frame)
