"""Fits gates: probes that say per 20 ms frame how surely nobody speaks.

A logistic regression on frames of training clips. Features are a few latents of the SAEs of one or more
layers (log1p of the code in units of its own mean), chosen by elimination: a fit on many latents, the weaker
half of them dropped, a new fit, and so on; every size on the way gives a gate. The control is the same
regression on the layers' standardised raw activations.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from calibration.activations import (
    FRAMES_PER_SECOND,
    MAX_FRAMES,
    check_layers,
    cut_window,
    encode_windows,
    padded_log_mel,
    true_frames,
)
from calibration.training_clips import Intervals, TrainingClip
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Gate, Probe

if TYPE_CHECKING:
    from whisper.model import Whisper

logger = logging.getLogger("whisper_steer")

SPEECH, NOBODY, UNCLEAR = 0, 1, -1
MARGIN = 0.25  # seconds around an utterance that belong to neither class (onsets, reverberation, attention)
GATE_SIZES = (256, 128, 64, 32, 16)
_SCREENED = 512  # latents that enter the elimination, by how differently they behave in the two classes
_CHUNK = 8192
_MAX_BYTES = 3 << 30


@dataclass(frozen=True)
class FrameSample:
    """Frames drawn from training clips.

    Attributes:
        x: by layer, (frames, d_model) activations.
        nobody: (frames,) bool: nobody speaks.
        weight: (frames,) float: both classes weigh the same, and within a class every condition does.
        counts: frames by class and condition, for the record.
    """

    x: Mapping[int, Tensor]
    nobody: np.ndarray
    weight: np.ndarray
    counts: dict[str, int]


def frame_targets(intervals: Intervals, n_true: int, *, silence_is_certain: bool = True) -> np.ndarray:
    """(1500,) SPEECH inside the intervals, NOBODY well outside of them and in the padding, UNCLEAR between.

    n_true: frames that hold audio. silence_is_certain=False: frames of the audio outside the intervals are
        UNCLEAR.
    """
    targets = np.full(MAX_FRAMES, NOBODY if silence_is_certain else UNCLEAR, dtype=np.int8)
    margin = round(MARGIN * FRAMES_PER_SECOND)
    spans = [
        (int(start * FRAMES_PER_SECOND), int(np.ceil(end * FRAMES_PER_SECOND))) for start, end in intervals
    ]
    targets[n_true:] = NOBODY
    for first, last in spans:
        targets[max(first - margin, 0) : last + margin] = UNCLEAR
    for first, last in spans:
        targets[first : min(last, n_true)] = SPEECH
    return targets


def collect_gate_frames(
    model: Whisper,
    clips: Sequence[TrainingClip],
    *,
    layers: Sequence[int] | None = None,
    per_clip: int = 48,
    padding_per_clip: int = 8,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> FrameSample:
    """Draw up to `per_clip` frames of every class from each clip's first window, and some of its padding.

    layers: None: all. Fewer frames are drawn where they would need more than 3 GB.
    Raises UsageError unless both classes are there.
    """
    wanted = check_layers(model, layers)
    room = _MAX_BYTES // (4 * model.dims.n_audio_state * len(wanted) * max(len(clips), 1))
    per_clip = max(2, min(per_clip, room * 2 // 3))
    padding_per_clip = max(1, min(padding_per_clip, room // 6))
    rng = np.random.default_rng(seed)
    frames: list[Tensor] = []
    nobody: list[np.ndarray] = []
    groups: list[str] = []

    def flush(waiting: list[tuple[TrainingClip, Tensor, int, np.ndarray]]) -> None:
        encoded = encode_windows(model, torch.stack([mel for _, mel, _, _ in waiting]), wanted).cpu()
        for index, (clip, _, n_true, targets) in enumerate(waiting):
            inside, padding = targets[:n_true], np.arange(n_true, MAX_FRAMES)
            picks = [
                ("speech", _draw(np.flatnonzero(inside == SPEECH), per_clip, rng)),
                ("nobody", _draw(np.flatnonzero(inside == NOBODY), per_clip, rng)),
                ("padding", _draw(padding[targets[n_true:] == NOBODY], padding_per_clip, rng)),
            ]
            for name, chosen in picks:
                frames.append(encoded[:, index, torch.from_numpy(chosen)].clone())
                nobody.append(np.full(len(chosen), name != "speech"))
                condition = "padding" if name == "padding" else f"{name}:{clip.kind}:{clip.condition}"
                groups.extend([condition] * len(chosen))

    waiting: list[tuple[TrainingClip, Tensor, int, np.ndarray]] = []
    for clip in tqdm(clips, desc="gate frames", unit="clip", disable=not progress):
        audio, intervals = clip.make()
        mel, content = padded_log_mel(audio, model.dims.n_mels)
        n_true = true_frames(len(audio))
        targets = frame_targets(intervals, n_true, silence_is_certain=clip.silence_is_certain)
        waiting.append((clip, cut_window(mel, content, 0), n_true, targets))
        if len(waiting) == batch:
            flush(waiting)
            waiting = []
    if waiting:
        flush(waiting)
    truth = np.concatenate(nobody) if nobody else np.zeros(0, dtype=bool)
    if not truth.any() or truth.all():
        raise UsageError(
            f"{len(clips)} training clips hold {'no non-speech' if not truth.any() else 'no speech'} frames: "
            "a gate needs both, give --corpus and --data with speech and non-speech"
        )
    weight, counts = balanced_weights(truth, groups)
    return FrameSample(dict(zip(wanted, torch.cat(frames, dim=1), strict=True)), truth, weight, counts)


def _draw(indices: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return indices if len(indices) <= count else np.sort(rng.choice(indices, count, replace=False))


def balanced_weights(nobody: np.ndarray, groups: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """Weights with mean 1: each class has half of the total, each of its groups an equal share; and group
    sizes.
    """
    names, inverse = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(inverse, minlength=len(names))
    of_class = np.zeros(len(names), dtype=bool)
    of_class[inverse] = nobody
    per_class = {value: int((of_class == value).sum()) for value in (False, True)}
    shares = np.array([1 / (2 * per_class[bool(value)]) for value in of_class])
    weight = shares[inverse] / sizes[inverse]
    return weight / weight.mean(), {str(name): int(size) for name, size in zip(names, sizes, strict=True)}


def fit_latent_gates(
    saes: Sequence[SparseAutoencoder],
    x: Mapping[int, Tensor],
    nobody: np.ndarray,
    weight: np.ndarray,
    *,
    sizes: Sequence[int] = GATE_SIZES,
    c: float = 1.0,
) -> dict[int, Gate]:
    """Gates on `sizes` latents of one layer's SAE, or of several layers' jointly.

    x: by layer, (frames, d_model). Several layers compete for the same number of
    latents; one that keeps none drops out of the gate.
    Smoothing, threshold and frame scale are neutral; see `calibration.selection` for their choice.
    Latents that never fire in the sample are left out; sizes above what remains give no gate.
    """
    screened = _SCREENED // len(saes)
    parts = [latent_features(sae, x[sae.layer], nobody, weight, screened=screened) for sae in saes]
    features = np.concatenate([part[0] for part in parts], axis=1)
    unit, kept = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    owner = np.concatenate([np.full(len(part[2]), number) for number, part in enumerate(parts)])
    gates: dict[int, Gate] = {}
    for size in sorted(set(sizes), reverse=True):
        if size > features.shape[1]:
            continue
        # halve towards the size, refitting each time: a latent that only doubled another one loses its
        # weight first
        while features.shape[1] > size:
            coefficients, _ = _logistic(features, nobody, weight, c)
            keep_count = max(size, features.shape[1] // 2)
            influence = np.abs(coefficients) * features.std(axis=0)
            keep = np.sort(np.argsort(-influence, kind="stable")[:keep_count])
            features, unit, kept, owner = features[:, keep], unit[keep], kept[keep], owner[keep]
        coefficients, intercept = _logistic(features, nobody, weight, c)
        probes = tuple(
            _latent_probe(sae, kept[owner == number], unit[owner == number], coefficients[owner == number])
            for number, sae in enumerate(saes)
            if (owner == number).any()
        )
        gates[size] = neutral_gate(probes, intercept)
    return gates


def _latent_probe(
    sae: SparseAutoencoder, kept: np.ndarray, unit: np.ndarray, coefficients: np.ndarray
) -> Probe:
    rows = torch.from_numpy(kept)
    return Probe(
        sae.layer,
        "latents",
        torch.from_numpy(coefficients),
        sae.W_enc.detach()[rows],
        sae.b_enc.detach()[rows],
        sae.theta[rows],
        torch.from_numpy(unit),
        indices=rows,
    )


def fit_raw_gate(
    layers: Sequence[int],
    x: Mapping[int, Tensor],
    nobody: np.ndarray,
    weight: np.ndarray,
    *,
    c: float = 0.1,
) -> Gate:
    """The control: the same regression on the standardised activations of one layer, or of several jointly.

    x: by layer, (frames, d_model).
    """
    means = [x[layer].mean(dim=0) for layer in layers]
    stds = [x[layer].std(dim=0).clamp_min(1e-6) for layer in layers]
    features = [(x[layer] - mean) / std for layer, mean, std in zip(layers, means, stds, strict=True)]
    coefficients, intercept = _logistic(torch.cat(features, dim=1).numpy(), nobody, weight, c)
    shares = np.split(coefficients, len(layers))
    probes = tuple(
        Probe(layer, "raw", torch.from_numpy(share.copy()), mean=mean, std=std)
        for layer, share, mean, std in zip(layers, shares, means, stds, strict=True)
    )
    return neutral_gate(probes, intercept)


@torch.no_grad()
def refit_gate(gate: Gate, x: Mapping[int, Tensor], nobody: np.ndarray, weight: np.ndarray) -> Gate:
    """The same features with coefficients fitted anew on x, by layer (frames, d_model); all else stays."""
    parts = [
        torch.cat([probe.features(rows) for rows in x[probe.layer].split(_CHUNK)]) for probe in gate.probes
    ]
    c = 0.1 if gate.kind == "raw" else 1.0
    coefficients, intercept = _logistic(torch.cat(parts, dim=1).numpy(), nobody, weight, c)
    shares = np.split(coefficients, np.cumsum([part.shape[1] for part in parts])[:-1])
    probes = tuple(
        replace(probe, coef=torch.from_numpy(share.copy()))
        for probe, share in zip(gate.probes, shares, strict=True)
    )
    return replace(gate, probes=probes, intercept=intercept)


@torch.no_grad()
def frame_loss(gate: Gate, x: Mapping[int, Tensor], nobody: np.ndarray, weight: np.ndarray) -> float:
    """Weighted mean cross-entropy (nats) of the gate's unsmoothed logits on frames x, by layer
    (frames, d_model)."""
    logits = gate.intercept + sum(probe.logits(x[probe.layer]) for probe in gate.probes)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.as_tensor(logits), torch.from_numpy(nobody.astype(np.float32)), reduction="none"
    )
    return float((losses.double() * torch.from_numpy(weight)).sum() / weight.sum())


def neutral_gate(probes: tuple[Probe, ...], intercept: float) -> Gate:
    """A gate without smoothing, threshold 0, that calibration.selection sets further."""
    return Gate(probes, intercept, smooth=1, threshold=0.0, spread=0.0, frame_scale=1.0, frame_bias=0.0)


@torch.no_grad()
def latent_features(
    sae: SparseAutoencoder, x: Tensor, nobody: np.ndarray, weight: np.ndarray, *, screened: int = _SCREENED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features (frames, m), unit (m,), latent numbers (m,)): the latents that separate the classes best
    alone.

    Feature: log1p(code / unit), unit the latent's mean non-zero code. Score: difference of the weighted
        class means
    over the feature's standard deviation.
    """
    n = sae.n_latents
    unit_sum, fired = np.zeros(n), np.zeros(n)
    for start in range(0, len(x), _CHUNK):
        codes = sae.encode(x[start : start + _CHUNK])
        unit_sum += codes.sum(dim=0).double().numpy()
        fired += (codes > 0).sum(dim=0).double().numpy()
    unit = (unit_sum / np.maximum(fired, 1)).astype(np.float32)
    unit[fired == 0] = 1.0
    w = {value: np.where(nobody == value, weight, 0.0) for value in (False, True)}
    means = {value: np.zeros(n) for value in w}
    squares = np.zeros(n)
    for start in range(0, len(x), _CHUNK):
        features = _features(sae, x[start : start + _CHUNK], unit)
        for value, weights in w.items():
            means[value] += weights[start : start + _CHUNK] @ features / weights.sum()
        squares += weight[start : start + _CHUNK] @ np.square(features) / weight.sum()
    variance = np.maximum(squares - ((means[False] + means[True]) / 2) ** 2, 1e-8)
    score = np.where(fired > 0, np.abs(means[True] - means[False]) / np.sqrt(variance), -1.0)
    count = min(screened, int((fired > 0).sum()))
    kept = np.sort(np.argsort(-score, kind="stable")[:count])
    parts = [_features(sae, x[start : start + _CHUNK], unit)[:, kept] for start in range(0, len(x), _CHUNK)]
    return np.concatenate(parts), unit[kept], kept


def _features(sae: SparseAutoencoder, x: Tensor, unit: np.ndarray) -> np.ndarray:
    return torch.log1p(sae.encode(x) / torch.from_numpy(unit)).numpy()


def _logistic(
    features: np.ndarray, nobody: np.ndarray, weight: np.ndarray, c: float
) -> tuple[np.ndarray, float]:
    regression = LogisticRegression(C=c, max_iter=300, tol=1e-4)
    with warnings.catch_warnings():
        # stopped early it is a slightly stronger regularisation, nothing to warn a user about
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(features, nobody, sample_weight=weight)
    return regression.coef_[0].astype(np.float32), float(regression.intercept_[0])
