"""Fits what a gate reads of windows as a whole, beside their frame most like speech.

Pools of the streams of the gate's layers (`whisper_steer.gate.pooled_windows`) tell windows in which somebody
speaks from the others: the mean over the window by how likely each frame is speech, the mean over all that is
not padding, and the standard deviation over that (speech comes and goes, most noise does not). Two fits
compete: a logistic regression on both means (window and sound probes), and a support vector machine on all
three (`whisper_steer.window_kernel`), which costs more bytes. Both are fitted on the training clips that gave
the gate, in all their conditions (of the synthetic ones, which are plenty and alike, every third), on
altered copies of the real ones (`some_altered`), and on the calibration clips: where they err is on
recordings of sources that they have not met. So that calibration clips can also choose how strong the
regularisation is and what the fit weighs beside the frames, and set the threshold, each is judged by a fit
without it and without its group (cross-fitting): of a real recording its speaker or source; a synthetic one
is a group of its own, whose voice the training clips have. Voices that nothing is trained on (`UNTAUGHT`)
teach nothing here either: the test split speaks with them, too.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from calibration.activations import cut_window, encode_windows, padded_log_mel
from calibration.export import write_whole
from calibration.gate_fit import SPEECH
from calibration.refit import UNTAUGHT, deal_folds
from calibration.selection import Budget, CalibrationClip, GateChoice, smoothed, window_choice
from calibration.training_clips import TrainingClip, is_synthetic, some_altered
from whisper_steer.errors import UsageError
from whisper_steer.gate import Gate, pooled_windows
from whisper_steer.passing import padding_frames
from whisper_steer.probe import Probe
from whisper_steer.window_kernel import WindowKernel

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")

REGULARISATIONS = (0.3, 1.0, 3.0)  # C of the regression
SHARES = (1.0, 2.0, 0.5)  # what the window probes, or the kernel, may weigh beside the frames
COMPONENTS = 128  # of the standardised pools: what a kernel compares
WIDTHS = (1.0, 2.0)  # gamma of a kernel, in units of one over the number of pooled features
PENALTY = 10.0  # C of the support vector machine
_FLAT = 1e-4  # of the widest: what varies less than this counts as so wide, for one over it must fit a half
_EVERY = 3  # of the synthetic training clips one in so many teaches
_BATCH = 16


@dataclass(frozen=True)
class WindowSample:
    """Windows as window probes read them.

    Attributes:
        x: (windows, 3 * layers, d_model) float32 in half precision: `pooled_windows` of the gate's layers.
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
    read = ["pooled windows", repr(gate.layers), str(gate.smooth)]
    key = hashlib.sha256("\n".join([*read, *(clip.id for clip in clips)]).encode())
    for probe in gate.probes:
        key.update(probe.coef.numpy().tobytes())
    name = np.array(key.hexdigest())
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as kept:
            if np.array_equal(kept["key"], name):
                return WindowSample(kept["x"].astype(np.float32), kept["nobody"])
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
        np.savez(buffer, key=name, x=sample.x.astype(np.float16), nobody=sample.nobody)
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
    """(rows, 3 * layers, d_model) float32: the clips' windows as a `WindowSample` has them; zeros in rows
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
    """(windows, 3 * layers, d_model) from mels, each with its frame logits; None: the gate's own."""
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
        # rounded as they are kept, so that a run that goes on comes to the same
        found.append(pooled_windows(frame_logits, list(streams), padding).half().float().cpu().numpy())
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


def fit_kernel(sample: WindowSample, layers: Sequence[int], width: float, seed: int = 0) -> WindowKernel:
    """A support vector machine on the principal components of the standardised pools, both classes weighing
    the same; its logit is the distance from the margin, in units of the margin.

    sample: of all pools of `layers`. Projection and landmarks are rounded to half precision, in which they
    are kept.
    """
    flat = sample.x.reshape(len(sample.x), -1).astype(np.float64)
    mean, std = flat.mean(axis=0), flat.std(axis=0)
    std = np.maximum(std, max(_FLAT * std.max(), _FLAT))
    standard = (flat - mean) / std
    count = min(COMPONENTS, *standard.shape)
    components = PCA(count, svd_solver="randomized", random_state=seed).fit(standard).components_
    projection = (components / std).astype(np.float16).astype(np.float64)
    z = ((flat - mean) @ projection.T).astype(np.float16).astype(np.float64)
    gamma = width / flat.shape[1]
    machine = SVC(C=PENALTY, gamma=gamma, class_weight="balanced", cache_size=1000).fit(z, sample.nobody)
    return WindowKernel(
        layers=tuple(layers),
        projection=torch.from_numpy(projection),
        offset=torch.from_numpy(projection @ mean),
        landmarks=torch.from_numpy(machine.support_vectors_),
        weights=torch.from_numpy(machine.dual_coef_[0]),
        gamma=gamma,
        intercept=float(machine.intercept_[0]),
    )


def scaled(kernel: WindowKernel, slope: float, start: float) -> WindowKernel:
    """The kernel whose logits are slope times as large, plus start."""
    return replace(kernel, weights=slope * kernel.weights, intercept=slope * kernel.intercept + start)


def out_of_fold(
    sample: WindowSample,
    own: WindowSample,
    usable: np.ndarray,
    folds: np.ndarray,
    fit: Callable[[WindowSample], Callable[[np.ndarray], np.ndarray]],
) -> np.ndarray:
    """(len(own),): what fits on sample and the usable part of own without a window's fold say of it.

    usable: (len(own),) bool, the others are judged but nothing is fitted on them. folds: (len(own),) int.
    fit: sample -> (windows, pools, d_model) -> (windows,).
    """
    said = np.zeros(len(own.x))
    for fold in np.unique(folds):
        mine = folds == fold
        said[mine] = fit(_joined(sample, own, usable & ~mine))(own.x[mine])
    return said


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
    taught = [clip for clip in (*training, *some_altered(training)) if _teaches(clip)]
    sample = training_windows(model, gate, taught, cache=cache, progress=progress)
    x = calibration_windows(model, gate, logits, clips, sources, progress=progress)
    nobody, spoken = _kinds(clips, targets)
    own, folds = WindowSample(x, nobody), _folds(clips, sources, len(x))
    usable = (nobody | spoken) & (folds >= 0)
    for clip in clips:
        if clip.set in UNTAUGHT:
            usable[list(clip.rows)] = False
    whole = _joined(sample, own, usable)
    found: list[tuple[dict[str, float], Gate, np.ndarray]] = []
    probes, probes_said, c = _best_probes(gate, sample, own, usable, folds, spoken)
    found += [
        ({"window_share": share, "window_c": c}, probes(share), share * probes_said) for share in SHARES
    ]
    known = nobody | spoken
    for width in WIDTHS:

        def fit(part: WindowSample, width: float = width) -> Callable[[np.ndarray], np.ndarray]:
            kernel = fit_kernel(part, gate.layers, width)
            return lambda x: np.asarray(kernel.logits(torch.from_numpy(x)).double())

        said = out_of_fold(sample, own, usable, folds, fit)
        slope, start = _as_logit(said[known], nobody[known])
        kernel = scaled(fit_kernel(whole, gate.layers, width), slope, start)
        for share in SHARES:
            with_kernel = replace(gate, kernel=kernel, kernel_share=share)
            row = {"kernel_share": share, "kernel_width": width, "landmarks": float(len(kernel.weights))}
            found.append((row, with_kernel, share * (slope * said + start)))
    best = choice
    table = list(choice.table)
    for row, with_more, more in found:
        tried = window_choice(choice.name, with_more, choice.window_logits + more, clips, budget)
        table += [{**measured, **row} for measured in tried.table]
        if tried.over_budgets < best.over_budgets:
            best = tried
    before, after = choice.over_budgets[0], best.over_budgets[0]
    logger.info("windows as a whole: text-FPR over budgets %.4f -> %.4f", before, after)
    return replace(best, table=tuple(table))


def _teaches(clip: TrainingClip) -> bool:
    return not is_synthetic(clip) or zlib.crc32(clip.id.encode()) % _EVERY == 0


def _best_probes(
    gate: Gate,
    sample: WindowSample,
    own: WindowSample,
    usable: np.ndarray,
    folds: np.ndarray,
    spoken: np.ndarray,
) -> tuple[Callable[[float], Gate], np.ndarray, float]:
    """(share -> the gate with window and sound probes, what they say out of fold, their C)."""
    layers, count = (*gate.layers, *gate.layers), len(gate.layers)

    def means(part: WindowSample) -> WindowSample:
        return WindowSample(part.x[:, : 2 * count], part.nobody)

    def fit(part: WindowSample, c: float) -> Callable[[np.ndarray], np.ndarray]:
        probes, intercept = fit_probes(means(part), layers, c)
        return lambda x: _said(probes, intercept, x[:, : 2 * count])

    said = {c: out_of_fold(sample, own, usable, folds, partial(fit, c=c)) for c in REGULARISATIONS}
    c = min(said, key=lambda one: _loss(said[one][own.nobody], said[one][spoken]))
    probes, intercept = fit_probes(means(_joined(sample, own, usable)), layers, c)

    def weighed(share: float) -> Gate:
        scaled_ = tuple(replace(probe, coef=share * probe.coef) for probe in probes)
        return replace(
            gate,
            window_probes=scaled_[:count],
            sound_probes=scaled_[count:],
            window_intercept=share * intercept,
        )

    return weighed, said[c], c


def _as_logit(said: np.ndarray, nobody: np.ndarray) -> tuple[float, float]:
    """(slope, start) of Platt's scaling: slope * said + start is the logit; both classes weigh the same."""
    regression = LogisticRegression(C=1e3, class_weight="balanced").fit(said[:, None], nobody)
    return float(regression.coef_[0, 0]), float(regression.intercept_[0])


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
