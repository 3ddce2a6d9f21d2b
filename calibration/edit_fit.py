"""Fits edits: which latents, or which direction, tell clips with a hallucination from clips without one.

On non-speech clips: a logistic regression on pooled SAE latents gives the latents (largest |beta|) and the
sign to push them by; the difference of mean activations gives a direction. Two published forms of the
first:

AudioSAE (arXiv 2602.05027)    x' = decoder(f + alpha s), s_j = -sign(beta_j) for the k largest |beta_j|,
else 0 follow-up (arXiv 2606.07473)   latents shifted against sign(beta_j), each by its own mean activation,
the error kept
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import Tensor

from calibration.hallucinations import Labels
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import LatentEdit, Shift

DEFINITIONS = ("text", "hr", "nsp")
MIN_CLASS = 8  # clips that the smaller class needs at least
MIN_SHARE = 0.03  # and the share of all clips


@dataclass(frozen=True)
class PooledClips:
    """Clips pooled over their true frames, for one layer.

    Attributes:
        latents: (clips, n_latents) mean over the frames in which a latent is non-zero, 0 where it never is.
        mean: (clips, d_model) mean activation.
        active_sum, active_count: (n_latents,) over the frames of all clips.
    """

    latents: np.ndarray
    mean: np.ndarray
    active_sum: np.ndarray
    active_count: np.ndarray

    @property
    def mean_activation(self) -> np.ndarray:
        """(n_latents,): mean non-zero code over all frames; 0 for a latent that never fired."""
        return self.active_sum / np.maximum(self.active_count, 1)


@torch.no_grad()
def pool_frames(
    sae: SparseAutoencoder | None, x: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One clip's (latents, mean, active_sum, active_count) from its true frames x (frames, d_model); no
    latents without an SAE."""
    if sae is None:
        nothing = np.zeros(0)
        return nothing.astype(np.float32), x.mean(dim=0).numpy(), nothing, nothing
    codes = sae.encode(x)
    count = (codes > 0).sum(dim=0)
    total = codes.sum(dim=0)
    return (
        (total / count.clamp_min(1)).numpy(),
        x.mean(dim=0).numpy(),
        total.double().numpy(),
        count.double().numpy(),
    )


@dataclass(frozen=True)
class Contrast:
    """What "hallucinated" means in a fit.

    Attributes:
        name: "text", "hr", "nsp", or "speech" (speech clips against non-speech clips).
        positive: (clips,) bool over the clips used.
        used: (clips,) bool: clips that take part.
        reason: why this contrast.
    """

    name: str
    positive: np.ndarray
    used: np.ndarray
    reason: str


def choose_contrast(
    labels: Sequence[Labels], nonspeech: np.ndarray, order: Sequence[str] = DEFINITIONS
) -> Contrast:
    """The first definition in `order` that splits the non-speech clips into two large enough classes.

    If one class is nearly empty under all of them (everything hallucinates), the contrast is speech against
    non-speech: a hallucinating encoder state is one that the decoder takes for speech.

    nonspeech: (clips,) bool.

    Raises:
        UsageError: not even both kinds of clips are there.
    """
    tried: list[str] = []
    total = int(nonspeech.sum())
    for name in order:
        attribute = {"text": "text_fp", "hr": "hr", "nsp": "nsp"}[name]
        positive = np.array([bool(getattr(label, attribute)) for label in labels]) & nonspeech
        smaller = min(int(positive.sum()), total - int(positive.sum()))
        if smaller >= max(MIN_CLASS, MIN_SHARE * total):
            text = f"{int(positive.sum())} of {total} non-speech clips hallucinate by {name}"
            return Contrast(name, positive, nonspeech, "; ".join([*tried, text]))
        tried.append(f"by {name} only {smaller} of {total} non-speech clips are in the smaller class")
    if nonspeech.all() or not nonspeech.any():
        raise UsageError(
            f"{len(labels)} clips, {total} of them non-speech, one class nearly empty ({'; '.join(tried)}): "
            "edits cannot be fitted without speech and non-speech clips"
        )
    reason = "; ".join([*tried, "speech clips against non-speech clips instead"])
    return Contrast("speech", ~nonspeech, np.ones(len(labels), dtype=bool), reason)


@dataclass(frozen=True)
class Regression:
    """Logistic regression of one layer: beta (n_latents,) on features scaled by their largest value, and
    its worth in cross-validation (balanced accuracy and F1, mean over folds).
    """

    beta: np.ndarray
    balanced_accuracy: float
    f1: float
    folds: int


def regress(latents: np.ndarray, positive: np.ndarray, *, folds: int = 5, seed: int = 0) -> Regression:
    """Fit hallucinated (positive) against not on pooled latents (clips, n_latents)."""
    scaled = latents / np.maximum(np.abs(latents).max(axis=0, keepdims=True), 1e-12)
    folds = min(folds, int(positive.sum()), int((~positive).sum()))
    regression = LogisticRegression(C=1.0, max_iter=2000, class_weight="balanced")
    scores = {"balanced_accuracy": float("nan"), "f1": float("nan")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if folds >= 2:
            splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
            for name in scores:
                values = cross_val_score(regression, scaled, positive, cv=splits, scoring=name)
                scores[name] = float(values.mean())
        regression.fit(scaled, positive)
    return Regression(regression.coef_[0], scores["balanced_accuracy"], scores["f1"], folds)


def top_latents(beta: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k largest |beta|, ascending."""
    return np.sort(np.argsort(-np.abs(beta), kind="stable")[:k])


def audiosae_edit(sae: SparseAutoencoder, beta: np.ndarray, k: int) -> LatentEdit:
    """AudioSAE's form, strength 1: every latent, values -sign(beta) at the top k, the reconstruction
    replaces x.
    """
    values = torch.zeros(sae.n_latents)
    chosen = top_latents(beta, k)
    values[torch.from_numpy(chosen)] = torch.from_numpy(-np.sign(beta[chosen]).astype(np.float32))
    return LatentEdit.from_sae(sae, None, values, mode="add", strength=1.0, reconstruct=True)


def additive_edit(
    sae: SparseAutoencoder, beta: np.ndarray, mean_activation: np.ndarray, k: int
) -> LatentEdit:
    """The follow-up's form, strength 1: the top k latents, shifted against sign(beta) by their mean
    activation.
    """
    chosen = top_latents(np.where(mean_activation > 0, beta, 0.0), k)
    values = (-np.sign(beta[chosen]) * mean_activation[chosen]).astype(np.float32)
    return LatentEdit.from_sae(
        sae, torch.from_numpy(chosen), torch.from_numpy(values), mode="add", floor=True
    )


def mean_difference(layer: int, mean: np.ndarray, positive: np.ndarray, *, normalised: bool) -> Shift:
    """From the mean activation of hallucinated clips towards that of the others, strength 1.

    normalised: AudioSAE's S-vector, of length 1; otherwise the follow-up's, of the difference's own length.
    mean: (clips, d_model).
    """
    direction = mean[~positive].mean(axis=0) - mean[positive].mean(axis=0)
    if normalised:
        direction = direction / max(float(np.linalg.norm(direction)), 1e-12)
    return Shift(layer=layer, direction=torch.from_numpy(direction.astype(np.float32)), strength=1.0)


def stack_pooled(parts: Sequence[tuple[np.ndarray, ...]]) -> PooledClips:
    """Join the results of `pool_frames` of several clips."""
    latents, means, sums, counts = zip(*parts, strict=True)
    return PooledClips(np.stack(latents), np.stack(means), np.sum(sums, axis=0), np.sum(counts, axis=0))


def contrast_record(contrast: Contrast) -> dict[str, object]:
    """What a steering file tells about the classes behind it."""
    return {
        "contrast": contrast.name,
        "contrast_reason": contrast.reason,
        "positive_clips": int(contrast.positive.sum()),
        "negative_clips": int((contrast.used & ~contrast.positive).sum()),
    }


def record_of(contrast: Contrast, regression: Regression) -> Mapping[str, object]:
    """What a steering file tells about the fit behind it."""
    return {
        **contrast_record(contrast),
        "balanced_accuracy": regression.balanced_accuracy,
        "f1": regression.f1,
        "folds": regression.folds,
    }
