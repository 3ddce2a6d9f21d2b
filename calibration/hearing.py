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
from calibration.evaluate import nonspeech_metrics, speech_metrics
from calibration.fit_files import Fit
from calibration.hallucinations import label_clips
from calibration.joined import join_clips
from calibration.selection import Budget, CalibrationClip
from calibration.speech_costs import SpeechCosts, understood_sets
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
        rise: of the WER, absolute, over the sets that plain Whisper understands (`SpeechCosts`).
        rise_hi: upper end of its 95 % bootstrap interval.
        emptied: share of the speech clips of all sets that came back without words and had some before.
        emptied_hi: upper end of its interval, among all or among understood sets, the larger one.
        set_rise: of the WER in the set of those that plain Whisper understands where it rises most.
    """

    transcripts: Mapping[tuple[str, str], ClipTranscript]
    wer: float
    wer_plain: float
    rise: float
    rise_hi: float
    emptied: float = 0.0
    emptied_hi: float = 0.0
    set_rise: float = 0.0


def compare(clips: Sequence[CalibrationClip], transcripts: Sequence[ClipTranscript]) -> Heard:
    """Set transcripts of a steered model against the clips' plain ones."""
    heard = {(clip.set, clip.id): t for clip, t in zip(clips, transcripts, strict=True)}
    costs = SpeechCosts(clips)
    words = float(costs.words.sum())
    if not words:
        return Heard(heard, 0.0, 0.0, 0.0, 0.0)
    after = [heard[clip.set, clip.id] for clip in costs.clips]
    errors = costs.errors([transcript.text for transcript in after])
    emptied = np.array([clip.is_emptied(t) for clip, t in zip(costs.clips, after, strict=True)])
    return Heard(
        heard,
        float(errors.sum() / words),
        float(costs.plain.sum() / words),
        *costs.rise(errors - costs.plain),
        float(np.mean(emptied)),
        costs.share_hi(emptied),
        costs.set_rise(errors - costs.plain),
    )


def _without_speech(clips: Sequence[Clip]) -> bool:
    return all(clip.kind == "nonspeech" for clip in clips)


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
        language: str = "en",
    ):
        """joined: recordings of speech and other sounds in turn (calibration.joined) with what plain
        Whisper makes of them, in the order of `joined_sources`. language: code of what is spoken."""
        self.model, self.fit, self.budget, self.effort = model, fit, budget, effort
        self.language = language
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
        language: str = "en",
        progress: bool = True,
    ) -> Calibration:
        """With joined recordings of the sets' clips, labelled as plain Whisper hears them.

        cache: file of `label_clips`.
        """
        known = understood_sets(fit.table.clips)
        chosen = {name: clips for name, clips in sets.items() if name in known or _without_speech(clips)}
        sources = join_clips(chosen if known else sets, count=effort.joined, seed=seed)
        labels = label_clips(model, sources, cache=cache, language=language, progress=progress)
        joined = [
            CalibrationClip.of(clip, clip.category, labels[clip.id].transcript, language=language)
            for clip in sources
        ]
        return cls(model, sets, fit, budget, effort, joined, sources, language)

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
                running = iterate_transcripts(self.model, audios, language=self.language)
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
            groups = [clip.group for clip in chosen]
            if chosen[0].is_speech:
                references = [clip.reference or "" for clip in chosen]
                options: dict[str, Any] = {"groups": groups, "language": chosen[0].language}
                row = speech_metrics(references, [t.text for t in after], **options).row()
                texts = [clip.transcript.text for clip in chosen]
                plain = speech_metrics(references, texts, **options).row()
                emptied = [clip.is_emptied(t) for clip, t in zip(chosen, after, strict=True)]
                rates[name] = {**row, "wrongly_emptied": sum(emptied) / len(emptied), "plain": plain}
            else:
                outcomes = [clip.outcome(t) for clip, t in zip(chosen, after, strict=True)]
                row = nonspeech_metrics(outcomes, groups=groups).row()
                outcomes = [clip.outcome(clip.transcript) for clip in chosen]
                plain = nonspeech_metrics(outcomes, groups=groups).row()
                rates[name] = {**row, "plain": plain}
        return rates
