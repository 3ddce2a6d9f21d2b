"""Fits a gate's window and sound probes: what the window as a whole says, beside its frame most like speech.

A logistic regression on the streams of the gate's layers, averaged over the window by how likely each frame
is speech (`whisper_steer.gate.likely_speech`) and over all that is not padding (`mean_of_sound`), tells
windows in which somebody speaks from the others. It is fitted on the training clips that gave the gate, in
all their conditions, on altered copies of the real ones (`some_altered`), and on the calibration clips: where
it errs is on recordings of sources that it has not met. So that calibration clips can also choose how strong
its regularisation is and what it weighs beside the frames, and set the threshold, each is judged by probes
that were fitted without it and without its group (cross-fitting): of a real recording its speaker or source;
a synthetic one is a group of its own, whose voice the training clips have. Voices that nothing is trained on
(`UNTAUGHT`) teach nothing here either: the test split speaks with them, too.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from calibration.activations import cut_window, encode_windows, padded_log_mel
from calibration.export import write_whole
from calibration.gate_fit import SPEECH
from calibration.refit import UNTAUGHT, deal_folds
from calibration.selection import Budget, CalibrationClip, GateChoice, smoothed, window_choice
from calibration.training_clips import TrainingClip, some_altered
from whisper_steer.errors import UsageError
from whisper_steer.gate import Gate, likely_speech, mean_of_sound
from whisper_steer.passing import padding_frames
from whisper_steer.probe import Probe

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")

REGULARISATIONS = (0.3, 1.0, 3.0)  # C of the regression
SHARES = (1.0, 2.0, 0.5)  # what the window probes may weigh beside the frames
_BATCH = 16


@dataclass(frozen=True)
class WindowSample:
    """Windows as window probes read them.

    Attributes:
        x: (windows, 2 * layers, d_model) float32, `likely_speech` of the gate's layers, then `mean_of_sound`.
        nobody: (windows,) bool: nobody speaks.
    """

    x: np.ndarray
    nobody: np.ndarray


def training_windows(
    model: Whisper,
    gate: Gate,
    clips: Sequence[TrainingClip],
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> WindowSample:
    """The first window of every training clip; of speech only where somebody is known to speak.

    cache: a file that keeps the result for the same gate and clips.
    """
    read = ["likely speech, sound", repr(gate.layers), str(gate.smooth)]
    key = hashlib.sha256("\n".join([*read, *(clip.id for clip in clips)]).encode())
    for probe in gate.probes:
        key.update(probe.coef.numpy().tobytes())
    name = np.array(key.hexdigest())
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as kept:
            if np.array_equal(kept["key"], name):
                return WindowSample(kept["x"], kept["nobody"])
    nobody: list[bool] = []

    def windows() -> Iterable[tuple[Tensor, None]]:
        for clip in tqdm(clips, desc="windows as a whole", unit="clip", disable=not progress):
            audio, intervals = clip.make()
            if clip.kind != "nonspeech" and not intervals:
                continue  # speech too faint to be found
            nobody.append(clip.kind == "nonspeech")
            yield cut_window(*padded_log_mel(audio, model.dims.n_mels), 0), None

    sample = WindowSample(_read(model, gate, windows()), np.array(nobody))
    if cache is not None:
        buffer = io.BytesIO()
        np.savez(buffer, key=name, x=sample.x, nobody=sample.nobody)
        write_whole(cache, buffer.getvalue())
    return sample


def calibration_windows(
    model: Whisper,
    gate: Gate,
    logits: np.ndarray,
    clips: Sequence[CalibrationClip],
    sources: Mapping[tuple[str, str], Clip],
    *,
    progress: bool = True,
) -> np.ndarray:
    """(rows, 2 * layers, d_model) float32: the clips' windows as a `WindowSample` has them; zeros in rows
    that no clip has.

    gate: its smoothing counts. logits: (rows, frames) its unsmoothed frame logits.
    """
    rows: list[int] = []

    def windows() -> Iterable[tuple[Tensor, np.ndarray]]:
        for clip in tqdm(clips, desc="calibration windows", unit="clip", disable=not progress):
            mel, content = padded_log_mel(sources[clip.set, clip.id].load(), model.dims.n_mels)
            for row, window in zip(clip.rows, clip.transcript.windows, strict=True):
                rows.append(row)
                yield cut_window(mel, content, window.seek), smoothed(logits[row : row + 1], gate.smooth)[0]

    found = _read(model, gate, windows())
    x = np.zeros((len(logits), *found.shape[1:]), np.float32)
    x[rows] = found
    return x


def _read(model: Whisper, gate: Gate, windows: Iterable[tuple[Tensor, np.ndarray | None]]) -> np.ndarray:
    """(windows, 2 * layers, d_model) from mels, each with its frame logits; None: the gate's own."""
    layers = list(gate.layers)
    found: list[np.ndarray] = []
    waiting: list[tuple[Tensor, np.ndarray | None]] = []

    @torch.no_grad()
    def flush() -> None:
        mels = torch.stack([mel for mel, _ in waiting])
        streams = encode_windows(model, mels, layers)
        frame_logits = gate.frame_logits(dict(zip(layers, streams, strict=True)))
        for i, (_, known) in enumerate(waiting):
            if known is not None:
                frame_logits[i] = torch.from_numpy(known)
        padding = padding_frames(mels.to(streams.device))
        means = [likely_speech(frame_logits, x) for x in streams] + [
            mean_of_sound(x, padding) for x in streams
        ]
        found.append(torch.stack(means, dim=1).cpu().numpy())
        waiting.clear()

    for window in windows:
        waiting.append(window)
        if len(waiting) == _BATCH:
            flush()
    if waiting:
        flush()
    return np.concatenate(found)


def fit_probes(sample: WindowSample, layers: Sequence[int], c: float) -> tuple[tuple[Probe, ...], float]:
    """(one raw probe per place of the sample, the intercept) of the logit that nobody speaks; both classes
    weigh the same. layers: of the places."""
    mean = sample.x.mean(axis=0)
    std = np.maximum(sample.x.std(axis=0), 1e-6)
    features = ((sample.x - mean) / std).reshape(len(sample.x), -1)
    regression = LogisticRegression(C=c, max_iter=3000, class_weight="balanced")
    regression.fit(features, sample.nobody)
    coefficients = regression.coef_[0].reshape(len(layers), -1).astype(np.float32)
    probes = tuple(
        Probe(layer, "raw", torch.from_numpy(coefficients[i].copy()), mean=mean[i], std=std[i])
        for i, layer in enumerate(layers)
    )
    return probes, float(regression.intercept_[0])


def cross_fitted(
    sample: WindowSample,
    own: WindowSample,
    usable: np.ndarray,
    folds: np.ndarray,
    layers: Sequence[int],
    c: float,
) -> tuple[tuple[Probe, ...], float, np.ndarray]:
    """(probes and intercept fitted on sample and the usable part of own, (len(own),) what probes that were
    fitted without a window's fold say of it).

    usable: (len(own),) bool, the others are judged but nothing is fitted on them. folds: (len(own),) int.
    """
    said = np.zeros(len(own.x))
    for fold in np.unique(folds):
        mine = folds == fold
        said[mine] = _said(*fit_probes(_joined(sample, own, usable & ~mine), layers, c), own.x[mine])
    return (*fit_probes(_joined(sample, own, usable), layers, c), said)


def _joined(sample: WindowSample, own: WindowSample, chosen: np.ndarray) -> WindowSample:
    return WindowSample(
        np.concatenate([sample.x, own.x[chosen]]), np.concatenate([sample.nobody, own.nobody[chosen]])
    )


def with_window_probes(
    model: Whisper,
    choice: GateChoice,
    logits: np.ndarray,
    targets: np.ndarray,
    clips: Sequence[CalibrationClip],
    sources: Mapping[tuple[str, str], Clip],
    training: Sequence[TrainingClip],
    budget: Budget,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> GateChoice:
    """The choice with window probes and its threshold set anew; as it was where they do not lower text-FPR
    over a range of budgets. Its window logits are out of fold: what they say of the clips is not flattered.

    logits: (rows, frames) unsmoothed frame logits of the chosen gate on clips that it was not fitted on;
    targets: the same shape, SPEECH, NOBODY or UNCLEAR. training: with both kinds. cache: see
    `training_windows`. Where all calibration clips of a kind are of one group, nothing is fitted on them.
    """
    gate = choice.gate
    taught = [*training, *some_altered(training)]
    sample = training_windows(model, gate, taught, cache=cache, progress=progress)
    x = calibration_windows(model, gate, logits, clips, sources, progress=progress)
    nobody, spoken = _kinds(clips, targets)
    own, folds = WindowSample(x, nobody), _folds(clips, sources, len(x))
    usable = (nobody | spoken) & (folds >= 0)
    for clip in clips:
        if clip.set in UNTAUGHT:
            usable[list(clip.rows)] = False
    layers = (*gate.layers, *gate.layers)
    fits = {c: cross_fitted(sample, own, usable, folds, layers, c) for c in REGULARISATIONS}
    losses = {c: _loss(said[nobody], said[spoken]) for c, (_, _, said) in fits.items()}
    c = min(losses, key=lambda one: losses[one])
    probes, intercept, said = fits[c]
    best = choice
    table = list(choice.table)
    for share in SHARES:
        weighed = tuple(replace(probe, coef=share * probe.coef) for probe in probes)
        whole = replace(
            gate,
            window_probes=weighed[: len(gate.layers)],
            sound_probes=weighed[len(gate.layers) :],
            window_intercept=share * intercept,
        )
        tried = window_choice(choice.name, whole, choice.window_logits + share * said, clips, budget)
        table += [{**row, "window_share": share, "window_c": c} for row in tried.table]
        if tried.over_budgets < best.over_budgets:
            best = tried
    before, after = choice.over_budgets[0], best.over_budgets[0]
    logger.info("window probes: text-FPR over budgets %.4f -> %.4f", before, after)
    return replace(best, table=tuple(table))


def _kinds(clips: Sequence[CalibrationClip], targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) bool twice: nobody speaks in the window; somebody surely does."""
    nobody, spoken = np.zeros(len(targets), bool), np.zeros(len(targets), bool)
    for clip in clips:
        for row in clip.rows:
            nobody[row] = not clip.is_speech
            spoken[row] = clip.is_speech and bool((targets[row] == SPEECH).any())
    return nobody, spoken


def _folds(
    clips: Sequence[CalibrationClip], sources: Mapping[tuple[str, str], Clip], rows: int
) -> np.ndarray:
    """(rows,) int, the fold of every window's clip; all -1 where the clips cannot be dealt out."""
    folds = np.full(rows, -1)
    try:
        owners = deal_folds([sources[clip.set, clip.id] for clip in clips])
    except UsageError as error:
        logger.warning("window probes are fitted on training clips alone: %s", error)
        return folds
    for clip, owner in zip(clips, owners, strict=True):
        folds[list(clip.rows)] = owner
    return folds


def _loss(nobody: np.ndarray, spoken: np.ndarray) -> float:
    """Mean cross-entropy (nats) of logits that nobody speaks, both classes weighing the same."""
    return float(np.logaddexp(0.0, -nobody).mean() + np.logaddexp(0.0, spoken).mean()) / 2


def _said(probes: Sequence[Probe], intercept: float, x: np.ndarray) -> np.ndarray:
    """(windows, places, d_model) -> (windows,) float64."""
    parts = [probe.logits(torch.from_numpy(x[:, i])) for i, probe in enumerate(probes)]
    return np.asarray((torch.stack(parts).sum(dim=0) + intercept).double())
