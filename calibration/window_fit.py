"""Fits a gate's window probes: what the window as a whole says, beside its frame most like speech.

A logistic regression on the streams of the gate's layers, averaged over the window by how likely each frame
is speech (`whisper_steer.gate.likely_speech`), tells windows in which somebody speaks from the others. It is
fitted on the training clips that gave the gate, in all their conditions; calibration clips choose how strong
its regularisation is and what it weighs beside the frames, and set the threshold.
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
from calibration.selection import Budget, CalibrationClip, GateChoice, smoothed, window_choice
from calibration.training_clips import TrainingClip
from whisper_steer.gate import Gate, likely_speech
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
        x: (windows, layers, d_model) float32, `likely_speech` of the gate's layers.
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
    key = hashlib.sha256("\n".join([repr(gate.layers), str(gate.smooth), *(c.id for c in clips)]).encode())
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
    """(rows, layers, d_model) float32: `likely_speech` of the gate's layers in the clips' windows; zeros in
    rows that no clip has.

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
    """(windows, layers, d_model) from mels, each with its frame logits; None: the gate's own."""
    layers = list(gate.layers)
    found: list[np.ndarray] = []
    waiting: list[tuple[Tensor, np.ndarray | None]] = []

    @torch.no_grad()
    def flush() -> None:
        streams = encode_windows(model, torch.stack([mel for mel, _ in waiting]), layers)
        frame_logits = gate.frame_logits(dict(zip(layers, streams, strict=True)))
        for i, (_, known) in enumerate(waiting):
            if known is not None:
                frame_logits[i] = torch.from_numpy(known)
        found.append(torch.stack([likely_speech(frame_logits, x) for x in streams], dim=1).cpu().numpy())
        waiting.clear()

    for window in windows:
        waiting.append(window)
        if len(waiting) == _BATCH:
            flush()
    if waiting:
        flush()
    return np.concatenate(found)


def fit_probes(sample: WindowSample, layers: Sequence[int], c: float) -> tuple[tuple[Probe, ...], float]:
    """(one raw probe per layer, the intercept) of the logit that nobody speaks; both classes weigh the
    same."""
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
    over a range of budgets.

    logits: (rows, frames) unsmoothed frame logits of the chosen gate on clips that it was not fitted on;
    targets: the same shape, SPEECH, NOBODY or UNCLEAR. training: with both kinds. cache: see
    `training_windows`.
    """
    gate = choice.gate
    sample = training_windows(model, gate, training, cache=cache, progress=progress)
    x = calibration_windows(model, gate, logits, clips, sources, progress=progress)
    fits = {c: fit_probes(sample, gate.layers, c) for c in REGULARISATIONS}
    said = {c: _said(*fitted, x) for c, fitted in fits.items()}
    nobody = [row for clip in clips if not clip.is_speech for row in clip.rows]
    spoken = [row for clip in clips if clip.is_speech for row in clip.rows if (targets[row] == SPEECH).any()]
    losses = {c: _loss(values[nobody], values[spoken]) for c, values in said.items()}
    c = min(losses, key=lambda one: losses[one])
    probes, intercept = fits[c]
    best = choice
    table = list(choice.table)
    for share in SHARES:
        weighed = tuple(replace(probe, coef=share * probe.coef) for probe in probes)
        whole = replace(gate, window_probes=weighed, window_intercept=share * intercept)
        tried = window_choice(choice.name, whole, choice.window_logits + share * said[c], clips, budget)
        table += [{**row, "window_share": share, "window_c": c} for row in tried.table]
        if tried.over_budgets < best.over_budgets:
            best = tried
    before, after = choice.over_budgets[0], best.over_budgets[0]
    logger.info("window probes: text-FPR over budgets %.4f -> %.4f", before, after)
    return replace(best, table=tuple(table))


def _loss(nobody: np.ndarray, spoken: np.ndarray) -> float:
    """Mean cross-entropy (nats) of logits that nobody speaks, both classes weighing the same."""
    return float(np.logaddexp(0.0, -nobody).mean() + np.logaddexp(0.0, spoken).mean()) / 2


def _said(probes: Sequence[Probe], intercept: float, x: np.ndarray) -> np.ndarray:
    """(windows, layers, d_model) -> (windows,) float64."""
    parts = [probe.logits(torch.from_numpy(x[:, i])) for i, probe in enumerate(probes)]
    return np.asarray((torch.stack(parts).sum(dim=0) + intercept).double())
