"""One recording transcribed twice, plain and steered, and what differs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.model import Whisper

from .attach import handles_of, steer
from .audio import check_audio, load_audio
from .errors import UsageError
from .passing import padding_frames
from .registry import model_lock
from .steering import Gate, Steering
from .transcribe import Segment, Transcript, transcribe
from .withholding import Suppressed
from .zoo import load_steering, steering_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .backends import Progress


@dataclass(frozen=True)
class ScoredText:
    """One segment of either transcript. words: (word, changed) pairs: not in the other transcript's row.
    start, end: seconds. gate: probability that nobody speaks in its window, None without a gate.
    no_speech_prob, avg_logprob: the decoder's own scores, None if it was not run."""

    start: float
    end: float
    words: tuple[tuple[str, bool], ...]
    no_speech_prob: float | None
    avg_logprob: float | None
    gate: float | None

    @property
    def text(self) -> str:
        return " ".join(word for word, _ in self.words)


@dataclass(frozen=True)
class Row:
    """A stretch of time in which the segments of the two transcripts overlap each other, and nothing else.

    withheld: windows of this stretch that the gate kept silent.
    """

    start: float
    end: float
    plain: tuple[ScoredText, ...]
    steered: tuple[ScoredText, ...]
    withheld: tuple[Suppressed, ...]

    def pairs(self) -> list[tuple[ScoredText | None, ScoredText | None]]:
        """Segments side by side, in order."""
        return list(zip_longest(self.plain, self.steered))


@dataclass(frozen=True)
class Comparison:
    """Both transcripts and their rows in time order."""

    plain: Transcript
    steered: Transcript
    rows: tuple[Row, ...]

    @property
    def removed(self) -> tuple[str, ...]:
        """Words that only plain Whisper wrote."""
        return tuple(w for row in self.rows for part in row.plain for w, changed in part.words if changed)

    @property
    def added(self) -> tuple[str, ...]:
        """Words that only the steered model wrote."""
        return tuple(w for row in self.rows for part in row.steered for w, changed in part.words if changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": self.steered.model,
            "steering": self.steered.steering,
            "alpha": self.steered.alpha,
            "profile": self.steered.profile,
            "duration": self.steered.duration,
            "plain": self.plain.to_dict(),
            "steered": self.steered.to_dict(),
            "removed": list(self.removed),
            "added": list(self.added),
            "rows": [
                {
                    "start": row.start,
                    "end": row.end,
                    "plain": [_part_dict(part) for part in row.plain],
                    "steered": [_part_dict(part) for part in row.steered],
                    "withheld": [asdict(window) for window in row.withheld],
                }
                for row in self.rows
            ],
        }


def compare(
    audio: str | Path | Any,
    model: Whisper,
    *,
    alpha: float | None = None,
    profile: str | None = None,
    steering: Steering | str | Path | None = None,
    decode_withheld: bool = False,
    progress: Progress | None = None,
    **whisper_options: Any,
) -> Comparison:
    """Transcribe a file or samples with a plain model, then steered, with the same options.

    model: a loaded one without a steering on it. alpha, profile, steering, decode_withheld, progress (called
    over both passes), whisper_options: as in transcribe. Raises what transcribe raises.
    """
    if handles_of(model):
        raise UsageError("compare needs a plain model: call handle.remove() first")
    samples = load_audio(audio) if isinstance(audio, (str, Path)) else check_audio(audio)
    if not isinstance(steering, Steering):
        steering = (
            steering_for(model) if steering is None else load_steering(steering, getattr(model, "name", None))
        )
    asked: dict[str, Any] = {"alpha": alpha, "profile": profile, "steering": steering}
    with steer(model, **asked):
        pass  # refuses a bad alpha or another model's steering before the work begins
    plain = transcribe(samples, model, alpha=0, progress=_half(progress, 0), **whisper_options)
    steered = transcribe(
        samples,
        model,
        **asked,
        decode_withheld=decode_withheld,
        progress=_half(progress, 1),
        **whisper_options,
    )
    seeks = {segment.seek for segment in (*plain.segments, *steered.segments)}
    gate_scores = scores_of_windows(model, samples, seeks, steering.gate) if steering.gate else {}
    return Comparison(plain, steered, tuple(_rows(plain, steered, gate_scores)))


def scores_of_windows(
    model: Whisper, samples: NDArray[np.float32], seeks: Iterable[int], gate: Gate
) -> dict[int, float]:
    """Probability that nobody speaks, for the 30 s windows that begin at `seeks` (mel frames of 10 ms).

    Reads the plain encoder; whisper.transcribe may have decoded a window of the same start cut short (at the
    end of the file the rest is padding in both).
    """
    mel = log_mel_spectrogram(samples, model.dims.n_mels, padding=N_SAMPLES)
    found: dict[int, torch.Tensor] = {}
    scores = {}
    with model_lock(model), torch.no_grad():
        hooks = [
            model.encoder.blocks[layer].register_forward_hook(partial(_keep_output, found, layer))
            for layer in gate.layers
        ]
        try:
            for seek in sorted(seeks):
                content = mel.shape[-1] - N_FRAMES - seek
                window = pad_or_trim(mel[:, seek : seek + min(N_FRAMES, content)], N_FRAMES)
                window = window[None].to(model.device)
                model.encoder(window)
                logit = gate.window_logit(gate.frame_logits(found), found, padding_frames(window))
                scores[seek] = float(torch.sigmoid(logit.double())[0])
        finally:
            for hook in hooks:
                hook.remove()
    return scores


def _keep_output(
    found: dict[int, torch.Tensor], layer: int, module: Any, args: Any, output: torch.Tensor
) -> None:
    found[layer] = output


def diff_words(plain: Sequence[str], steered: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """For each word of either side: is it missing on the other? Case and punctuation do not count."""
    a, b = ([re.sub(r"[^\w]+", "", word).casefold() or word for word in words] for words in (plain, steered))
    changed = [True] * len(plain), [True] * len(steered)
    for i, j, size in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        changed[0][i : i + size] = [False] * size
        changed[1][j : j + size] = [False] * size
    return changed


def _rows(plain: Transcript, steered: Transcript, gate_scores: dict[int, float]) -> Iterable[Row]:
    for start, end, items in _overlapping([*plain.segments], [*steered.segments], [*steered.suppressed]):
        before, after, withheld = items
        words = [[segment.text.split() for segment in side] for side in (before, after)]
        flat = [[word for part in side for word in part] for side in words]
        changed = [iter(flags) for flags in diff_words(*flat)]
        sides = [
            tuple(
                _scored(segment, [(word, next(flags)) for word in part], gate_scores)
                for segment, part in zip(side, parts, strict=True)
            )
            for side, parts, flags in zip((before, after), words, changed, strict=True)
        ]
        yield Row(start, end, sides[0], sides[1], tuple(withheld))


def _overlapping(*lists: list[Any]) -> Iterable[tuple[float, float, tuple[list[Any], ...]]]:
    """Groups of items (anything with start and end) that overlap in time: (start, end, members per list)."""
    tagged = [
        (item.start or 0.0, item.end or 0.0, i, item) for i, items in enumerate(lists) for item in items
    ]
    group: tuple[list[Any], ...] = tuple([] for _ in lists)
    begin = reach = 0.0
    for start, end, which, item in sorted(tagged, key=lambda entry: entry[:3]):
        if any(group) and start >= reach:
            yield begin, reach, group
            group = tuple([] for _ in lists)
        if not any(group):
            begin, reach = start, start
        group[which].append(item)
        reach = max(reach, end)
    if any(group):
        yield begin, reach, group


def _scored(segment: Segment, words: list[tuple[str, bool]], gate_scores: dict[int, float]) -> ScoredText:
    return ScoredText(
        start=segment.start,
        end=segment.end,
        words=tuple(words),
        no_speech_prob=segment.no_speech_prob,
        avg_logprob=segment.avg_logprob,
        gate=gate_scores.get(segment.seek),
    )


def _part_dict(part: ScoredText) -> dict[str, Any]:
    return {
        "start": part.start,
        "end": part.end,
        "text": part.text,
        "changed": [word for word, changed in part.words if changed],
        "no_speech_prob": part.no_speech_prob,
        "avg_logprob": part.avg_logprob,
        "gate": part.gate,
    }


def _half(progress: Progress | None, number: int) -> Progress | None:
    """Progress over one of two passes, as progress over both."""
    if progress is None:
        return None
    report = progress
    return lambda done, total: report((done + number * total) / 2, total)
