"""Calibration clips heard with a steering on the model: transcripts, WER beside the plain one, rates per
set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.activations import cut_window, padded_log_mel
from calibration.decoding import ClipTranscript, iterate_transcripts
from calibration.evaluate import nonspeech_metrics, normalise, speech_metrics, word_errors
from calibration.fit_files import Fit
from calibration.hallucinations import label_clips
from calibration.joined import join_clips
from calibration.selection import Budget, CalibrationClip, share_upper_end
from whisper_steer.attach import steer
from whisper_steer.errors import UsageError
from whisper_steer.steering import Steering

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip


@dataclass(frozen=True)
class Effort:
    """How much is computed; the defaults keep fit and sweep under 15 minutes on two cores for mini.en.

    Attributes:
        screened: windows of speech, and of non-speech, on which every edit is screened.
        finalists: edits that are heard through `whisper.transcribe`.
        heard: speech clips on which a finalist's WER is measured.
        measured: clips, of all sets, on which what is written is measured; 0: all.
        joined: recordings of speech and other sounds in turn, on which edits are compared.
        frontier: clips on which the points of the frontier beside alpha 1 are measured.
    """

    screened: int = 24
    finalists: int = 4
    heard: int = 240
    measured: int = 0
    joined: int = 60
    frontier: int = 400

    def __post_init__(self) -> None:
        for name, least in (
            ("screened", 1),
            ("finalists", 0),
            ("heard", 1),
            ("measured", 0),
            ("joined", 0),
            ("frontier", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Heard:
    """A steering heard on some calibration clips.

    Attributes:
        transcripts: by (set, clip id).
        wer, wer_plain: over all speech clips, with the steering and without.
        rise: of the WER, absolute, over the sets that plain Whisper understands (all, if it understands
            none). Where it writes mostly wrong words, other wrong words mean nothing, and losing some looks
            like a gain.
        rise_hi: upper end of its 95 % bootstrap interval (clips drawn with replacement).
        emptied: share of the speech clips of all sets that came back without words and had some before.
        emptied_hi: upper end of its 95 % bootstrap interval.
    """

    transcripts: Mapping[tuple[str, str], ClipTranscript]
    wer: float
    wer_plain: float
    rise: float
    rise_hi: float
    emptied: float = 0.0
    emptied_hi: float = 0.0


UNDERSTOOD = 0.5  # plain WER up to which a set counts as understood
_DRAWS = 2000


def compare(clips: Sequence[CalibrationClip], transcripts: Sequence[ClipTranscript]) -> Heard:
    """Set transcripts of a steered model against the clips' plain ones."""
    counts: dict[str, list[tuple[int, int, int]]] = {}  # by set: words, errors, plain errors of each clip
    for clip, transcript in zip(clips, transcripts, strict=True):
        after = word_errors(clip.reference or "", transcript.text)
        plain = word_errors(clip.reference or "", clip.transcript.text)
        if after is not None and plain is not None:
            counts.setdefault(clip.set, []).append((after.words, after.total, plain.total))
    tables = [np.array(rows, dtype=float) for rows in counts.values()]
    understood = [rows for rows in tables if rows[:, 2].sum() <= UNDERSTOOD * rows[:, 0].sum()]
    heard = {(clip.set, clip.id): t for clip, t in zip(clips, transcripts, strict=True)}
    if not tables:
        return Heard(heard, 0.0, 0.0, 0.0, 0.0)
    words, errors, plain_errors = np.concatenate(tables).sum(axis=0)
    emptied = [
        bool(normalise(clip.transcript.text)) and not normalise(transcript.text)
        for clip, transcript in zip(clips, transcripts, strict=True)
        if clip.is_speech
    ]
    return Heard(
        heard,
        float(errors / words),
        float(plain_errors / words),
        *_rise(np.concatenate(understood or tables)),
        float(np.mean(emptied)),
        share_upper_end(sum(emptied), len(emptied)),
    )


def understood_sets(clips: Sequence[CalibrationClip]) -> set[str]:
    """Names of the speech sets whose plain WER is at most UNDERSTOOD."""
    totals: dict[str, np.ndarray] = {}
    for clip in clips:
        plain = word_errors(clip.reference or "", clip.transcript.text) if clip.is_speech else None
        if plain is not None:
            totals[clip.set] = totals.get(clip.set, np.zeros(2)) + (plain.words, plain.total)
    return {name for name, (words, errors) in totals.items() if errors <= UNDERSTOOD * words}


def _without_speech(clips: Sequence[Clip]) -> bool:
    return all(clip.kind == "nonspeech" for clip in clips)


def _rise(rows: np.ndarray) -> tuple[float, float]:
    """Rise of the WER from rows of (words, errors, plain errors), and the upper end of its interval."""
    words, change = rows[:, 0], rows[:, 1] - rows[:, 2]
    rise = float(change.sum() / words.sum())
    if not change.any():
        return rise, rise
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_DRAWS)
    return rise, float(np.quantile((draws @ change) / np.maximum(draws @ words, 1), 0.975))


def first_windows(model: Whisper, clips: Sequence[Clip]) -> Tensor:
    """Mels (clips, n_mels, 3000) of the clips' first windows."""
    mels = [cut_window(*padded_log_mel(clip.load(), model.dims.n_mels), 0) for clip in clips]
    return torch.stack(mels)


class Calibration:
    """The model, the calibration clips and the fitted parts; what every stage below needs."""

    def __init__(
        self,
        model: Whisper,
        sets: Mapping[str, Sequence[Clip]],
        fit: Fit,
        budget: Budget,
        effort: Effort,
        joined: Sequence[CalibrationClip] = (),
        joined_sources: Sequence[Clip] = (),
    ):
        """joined: recordings of speech and other sounds in turn (calibration.joined) with what plain
        Whisper makes of them, in the order of `joined_sources`."""
        self.model, self.fit, self.budget, self.effort = model, fit, budget, effort
        self.sources = {(name, clip.id): clip for name, clips in sets.items() for clip in clips}
        self.joined = list(joined)
        self.sources |= {
            (clip.set, clip.id): source for clip, source in zip(joined, joined_sources, strict=True)
        }
        self.clips = fit.table.clips
        self.speech = [clip for clip in self.clips if clip.is_speech]
        self.nonspeech = [clip for clip in self.clips if not clip.is_speech]

    @classmethod
    def of(
        cls,
        model: Whisper,
        sets: Mapping[str, Sequence[Clip]],
        fit: Fit,
        budget: Budget,
        effort: Effort,
        *,
        cache: Path | None = None,
        seed: int = 3,
        progress: bool = True,
    ) -> Calibration:
        """With joined recordings of the sets' clips, labelled as plain Whisper hears them.

        cache: file of `label_clips`.
        """
        known = understood_sets(fit.table.clips)
        chosen = {name: clips for name, clips in sets.items() if name in known or _without_speech(clips)}
        sources = join_clips(chosen if known else sets, count=effort.joined, seed=seed)
        labels = label_clips(model, sources, cache=cache, progress=progress)
        joined = [
            CalibrationClip(clip.id, clip.category, clip.text or "", labels[clip.id].transcript, ())
            for clip in sources
        ]
        return cls(model, sets, fit, budget, effort, joined, sources)

    def hear(
        self,
        steering: Steering | None,
        clips: Sequence[CalibrationClip],
        label: str,
        *,
        progress: bool = True,
    ) -> Heard:
        """Transcribe clips with the steering at alpha 1 (None: the plain transcripts, nothing is run)."""
        if steering is None:
            transcripts = [clip.transcript for clip in clips]
        else:
            audios = (self.sources[clip.set, clip.id].load() for clip in clips)
            with steer(self.model, alpha=1.0, steering=steering, decode_withheld=False):
                running = iterate_transcripts(self.model, audios)
                bar = tqdm(running, total=len(clips), desc=label, unit="clip", disable=not progress)
                transcripts = list(bar)
        return compare(clips, transcripts)

    def first_windows(self, clips: Sequence[CalibrationClip]) -> Tensor:
        """Mels (clips, n_mels, 3000) of the clips' first windows."""
        return first_windows(self.model, [self.sources[clip.set, clip.id] for clip in clips])

    def rates(self, heard: Heard) -> dict[str, Any]:
        """Every set's measures with intervals, plain ones beside them, and the share of speech clips left
        empty that were not empty before.
        """
        rates: dict[str, Any] = {}
        names = list(dict.fromkeys(clip.set for clip in self.clips))
        for name in [*names, "all_speech", "all_nonspeech"]:
            chosen = [
                clip
                for clip in self.clips
                if (clip.set, clip.id) in heard.transcripts
                and name in (clip.set, "all_speech" if clip.is_speech else "all_nonspeech")
            ]
            if not chosen:
                continue
            after = [heard.transcripts[clip.set, clip.id] for clip in chosen]
            if chosen[0].is_speech:
                references = [clip.reference or "" for clip in chosen]
                row = speech_metrics(references, [t.text for t in after]).row()
                plain = speech_metrics(references, [clip.transcript.text for clip in chosen]).row()
                emptied = [
                    bool(normalise(clip.transcript.text)) and not normalise(t.text)
                    for clip, t in zip(chosen, after, strict=True)
                ]
                rates[name] = {**row, "wrongly_emptied": sum(emptied) / len(emptied), "plain": plain}
            else:
                row = nonspeech_metrics([t.outcome() for t in after]).row()
                plain = nonspeech_metrics([clip.transcript.outcome() for clip in chosen]).row()
                rates[name] = {**row, "plain": plain}
        return rates
