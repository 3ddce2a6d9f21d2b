"""Fits a chosen gate once more, on training and calibration clips together, and judges it honestly.

A threshold that is set on logits of clips that the gate was fitted on would be too low: such clips are easier
than new ones. Every calibration clip is therefore judged by a gate that was fitted without it (cross-fitting
over groups of clips); the gate that ships is fitted on all of them.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from calibration.gate_fit import FrameSample, collect_gate_frames, refit_gate
from calibration.selection import Budget, CalibrationClip, GateChoice, choose_gate
from calibration.training_clips import REAL_SPEECH_DB, Intervals, TrainingClip, active_intervals
from calibration.window_table import gate_logits
from whisper_steer.errors import UsageError
from whisper_steer.steering import Gate

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")

FOLDS = 5
# calibration sets that are judged, but nothing is fitted on them: their voices are the test split's, too
UNTAUGHT = ("speech_new_voice",)


def deal_folds(clips: Sequence[Clip], folds: int = FOLDS) -> list[int]:
    """The fold of every clip: groups (speakers or source recordings) stay together, and the groups of speech
    and of the rest are dealt out evenly, in the order of a hash.

    Fewer folds where there are fewer groups of either kind.
    Raises UsageError where either kind has only one group.
    """
    groups: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for clip in clips:
        groups[clip.kind == "nonspeech"].setdefault(_group(clip), 0)
    fewest = min(map(len, groups.values()))
    if fewest < 2:
        raise UsageError(
            f"{len(groups[False])} groups of speech and {len(groups[True])} of other recordings: expected at "
            "least 2 of each to judge a gate on recordings that it has not seen"
        )
    for dealt in groups.values():
        for place, name in enumerate(sorted(dealt, key=lambda name: (zlib.crc32(name.encode()), name))):
            dealt[name] = place % min(folds, fewest)
    return [groups[clip.kind == "nonspeech"][_group(clip)] for clip in clips]


def _group(clip: Clip) -> str:
    return str(getattr(clip, "group", "") or clip.id)


def as_training_clip(clip: Clip) -> TrainingClip:
    """A calibration clip as one that gates are fitted on: where it is loud, within its known intervals,
    somebody speaks; its quiet frames are neither."""
    if clip.kind == "nonspeech":
        return TrainingClip(clip.id, "nonspeech", _category(clip), partial(_with_intervals, clip))
    return TrainingClip(clip.id, "real_speech", _category(clip), partial(_with_intervals, clip))


def _category(clip: Clip) -> str:
    return str(getattr(clip, "category", "") or clip.kind)


def _with_intervals(clip: Clip) -> tuple[np.ndarray, Intervals]:
    audio = clip.load()
    if clip.kind == "nonspeech":
        return audio, ()
    loud = active_intervals(audio, within_db=REAL_SPEECH_DB)
    known = clip.speech_intervals
    if known is None:
        return audio, loud
    met = [(max(a, start), min(b, end)) for a, b in loud for start, end in known]
    return audio, tuple((start, end) for start, end in met if start < end)


def refit(
    model: Whisper,
    choice: GateChoice,
    sample: FrameSample,
    clips: Sequence[CalibrationClip],
    sources: Mapping[tuple[str, str], Clip],
    rows: int,
    budget: Budget,
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[GateChoice, np.ndarray]:
    """(the choice with the refitted gate and its threshold, out-of-fold logits (rows, 1500)).

    sample: the training frames that the chosen gate was fitted on. The smoothing is chosen again. Clips of
    the sets `UNTAUGHT` are judged, but teach nothing.
    Raises UsageError if the clips of either kind are all of one group (`deal_folds`), or too short.
    """
    owners = deal_folds([sources[clip.set, clip.id] for clip in clips])
    folds = max(owners) + 1
    layers = choice.gate.layers
    parts: list[FrameSample] = []
    for fold in range(folds):
        mine = [
            as_training_clip(sources[clip.set, clip.id])
            for clip, owner in zip(clips, owners, strict=True)
            if owner == fold and clip.set not in UNTAUGHT
        ]
        parts.append(collect_gate_frames(model, mine, layers=layers, seed=seed + 1 + fold, progress=progress))
    gates = [
        _fitted(choice.gate, [sample, *(part for other, part in enumerate(parts) if other != fold)])
        for fold in range(folds)
    ]
    final = _fitted(choice.gate, [sample, *parts])
    logits = gate_logits(model, gates, owners, clips, sources, rows, progress=progress)
    chosen = choose_gate({choice.name: final}, {choice.name: logits}, clips, budget)
    table = [{**row, "refitted": 1} for row in chosen.table]
    return replace(chosen, table=(*choice.table, *table)), logits


def _fitted(gate: Gate, samples: Sequence[FrameSample]) -> Gate:
    x = {layer: torch.cat([sample.x[layer] for sample in samples]) for layer in gate.layers}
    return refit_gate(
        gate,
        x,
        np.concatenate([sample.nobody for sample in samples]),
        np.concatenate([sample.weight for sample in samples]),
    )
