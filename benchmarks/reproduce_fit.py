"""The papers' vectors and latents, fitted on each data set's own clips, as edits for `steered_scores`.

Which clips hallucinate is read off plain Whisper's first greedy pass: no_speech_prob < 0.5 for AudioSAE, the
skip rule for the follow-up. Where that leaves one class nearly empty, `edit_fit.choose_contrast` falls back
to the next definition and at last to speech against non-speech, and the reason is reported.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from benchmarks.files import write_whole
from benchmarks.peers import audiosae, followup
from benchmarks.published import EIGHTH, TWO, Condition
from benchmarks.steered_scores import Score
from calibration.activations import encode_windows, true_frames, window_mels
from calibration.edit_fit import (
    Contrast,
    PooledClips,
    choose_contrast,
    pool_frames,
    regress,
    stack_pooled,
    top_latents,
)
from calibration.evaluate import Rate, bootstrap_ratio, evenly
from whisper_steer.edits import Edit, LatentEdit, Shift
from whisper_steer.errors import AudioError, MismatchError, ModelError, UsageError
from whisper_steer.sae import SparseAutoencoder

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip
    from calibration.hallucinations import Labels

_ARRAYS = ("latents", "mean", "active_sum", "active_count")
WINDOW_SAMPLES = 480_000  # 30 s at 16 kHz


# -- layers and SAEs


def layers_of(where: str, blocks: int, layer: int | None = None) -> tuple[int, ...]:
    """0-based layers of an encoder of `blocks` blocks for what a paper says of its own (1-based, 12 or 32).

    "block 8 of 12" is the same depth in another encoder. layer: the caller's choice for single layers.
    """
    if where == TWO:
        return (max(0, round(26 * blocks / 32) - 1), blocks - 1)
    if layer is not None:
        return (layer,)
    return (max(0, round(8 * blocks / 12) - 1),) if where == EIGHTH else (blocks - 1,)


def load_saes(
    model: Whisper, folder: Path | None, layers: Iterable[int]
) -> tuple[dict[int, SparseAutoencoder], list[str]]:
    """(the SAEs of these layers, a line for each that is missing).

    folder: holds layer_XX.safetensors, counted from 0; None: those kept for the model by its name.

    Raises UsageError: `folder` holds none of them. MismatchError: an SAE of another width or of another
    encoder. FormatError: a damaged file.
    """
    from whisper_steer.fileformat import encoder_sha256, model_name
    from whisper_steer.zoo import load_sae

    found: dict[int, SparseAutoencoder] = {}
    notes = []
    for layer in sorted(set(layers)):
        if folder is None:
            try:
                sae = load_sae(model_name(model), layer)
            except ModelError as error:
                notes.append(f"{error}; pass --saes DIR (whisper-steer saes import makes one)")
                continue
        else:
            path = folder / f"layer_{layer:02d}.safetensors"
            if not path.is_file():
                notes.append(f"no SAE for layer {layer}: {path} does not exist")
                continue
            sae = SparseAutoencoder.load(path)
        width, own = model.dims.n_audio_state, sae.metadata.get("encoder_sha256")
        if sae.d_model != width or (own is not None and own != encoder_sha256(model)):
            made_for = sae.metadata.get("base_model") or "an unknown model"
            raise MismatchError(
                f"the SAE of layer {layer} is for {made_for} (d_model {sae.d_model}), the model is "
                f"{model_name(model)} (d_model {width}): pass --saes with SAEs of this model"
            )
        found[layer] = sae
    if folder is not None and not found:
        raise UsageError(
            f"--saes {folder} holds no SAE of layers {', '.join(map(str, sorted(set(layers))))}: expected "
            "files such as layer_07.safetensors, counted from 0, as whisper-steer saes import writes them"
        )
    return found, notes


# -- pooled activations


def pool_clips(
    model: Whisper,
    clips: Sequence[Clip],
    saes: Mapping[int, SparseAutoencoder],
    layers: Sequence[int],
    *,
    store: Path | None = None,
    batch: int = 8,
    progress: bool = True,
    what: str = "",
) -> dict[int, PooledClips]:
    """By layer, one row per clip, pooled over all frames with audio; without an SAE there are no latents.

    store: folder where the result is kept, by what it was made of.
    """
    path = None if store is None else store / f"{_fingerprint(model, clips, saes, layers)}.npz"
    if path is not None and path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            return {n: PooledClips(*(arrays[f"{n}.{name}"] for name in _ARRAYS)) for n in layers}
    parts: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {n: [] for n in layers}
    nothing = np.zeros(0)
    counted = tqdm(clips, what, unit="clip", disable=not progress, file=sys.stderr)
    for frames in _frames(model, counted, layers, batch):
        for layer, x in zip(layers, frames, strict=True):
            sae = saes.get(layer)
            empty = (nothing, x.mean(dim=0).numpy(), nothing, nothing)
            parts[layer].append(empty if sae is None else pool_frames(sae, x))
    pooled = {layer: stack_pooled(rows) for layer, rows in parts.items()}
    if path is not None:
        buffer = io.BytesIO()
        arrays = {f"{n}.{name}": getattr(rows, name) for n, rows in pooled.items() for name in _ARRAYS}
        np.savez(buffer, **arrays)
        write_whole(path, buffer.getvalue())
    return pooled


def _frames(
    model: Whisper, clips: Iterable[Clip], layers: Sequence[int], batch: int
) -> Iterator[torch.Tensor]:
    """(layers, frames, d_model) of every clip, on the CPU."""
    waiting: list[tuple[torch.Tensor, int]] = []

    def encoded() -> Iterator[torch.Tensor]:
        mels = torch.cat([mels for mels, _ in waiting])
        parts = [encode_windows(model, mels[i : i + batch], layers).cpu() for i in range(0, len(mels), batch)]
        windows = torch.cat(parts, dim=1)
        first = 0
        for own, samples in waiting:
            counts = [true_frames(max(1, samples - i * WINDOW_SAMPLES)) for i in range(len(own))]
            yield torch.cat([windows[:, first + i, :count] for i, count in enumerate(counts)], dim=1)
            first += len(own)
        waiting.clear()

    for clip in clips:
        audio = clip.load()
        waiting.append((window_mels(audio, model.dims.n_mels), len(audio)))
        if sum(len(mels) for mels, _ in waiting) >= batch:
            yield from encoded()
    if waiting:
        yield from encoded()


def _fingerprint(
    model: Whisper, clips: Sequence[Clip], saes: Mapping[int, SparseAutoencoder], layers: Sequence[int]
) -> str:
    from whisper_steer.fileformat import encoder_sha256

    digest = hashlib.sha256(encoder_sha256(model).encode())
    for layer in layers:
        digest.update(f"layer {layer}".encode())
        for tensor in saes[layer].state_dict().values() if layer in saes else ():
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    for clip in clips:
        digest.update(f"{clip.id}:{clip.path}".encode())
    return digest.hexdigest()[:16]


# -- fits


@dataclass(frozen=True)
class Source:
    """The clips of a data set that may be fitted on.

    scores: plain Whisper's, decoded; pooled: by layer, in the same order.
    """

    scores: tuple[Score, ...]
    pooled: Mapping[int, PooledClips]


@dataclass(frozen=True)
class Fit:
    """One data set's hallucinated clips against the others.

    contrast.positive marks the rows of `pooled` (by layer).
    """

    contrast: Contrast
    pooled: Mapping[int, PooledClips]


def join(sources: Sequence[Source]) -> Source:
    """The clips of several sources as those of one."""
    scores = tuple(score for source in sources for score in source.scores)
    layers = sources[0].pooled
    return Source(scores, {n: _stacked([source.pooled[n] for source in sources]) for n in layers})


def _stacked(parts: Sequence[PooledClips]) -> PooledClips:
    sums = (sum(part.active_sum for part in parts), sum(part.active_count for part in parts))
    return PooledClips(
        np.concatenate([part.latents for part in parts]),
        np.concatenate([part.mean for part in parts]),
        *(np.asarray(value) for value in sums),
    )


def fit_source(nonspeech: Source, speech: Source | None, order: Sequence[str]) -> Fit:
    """The first definition of "hallucinated" in `order` ("nsp", "hr", "text") that splits the clips; where
    none does, as many speech clips against the non-speech ones.

    Raises UsageError: neither is possible.
    """
    scores = list(nonspeech.scores)
    try:
        contrast = choose_contrast(_as_labels(scores), np.ones(len(scores), dtype=bool), order)
        return Fit(contrast, nonspeech.pooled)
    except UsageError:
        if speech is None:
            raise
    chosen = evenly(range(len(speech.scores)), len(scores))
    picked = Source(
        tuple(speech.scores[i] for i in chosen),
        {
            n: replace(rows, latents=rows.latents[chosen], mean=rows.mean[chosen])
            for n, rows in speech.pooled.items()
        },
    )
    both = join([nonspeech, picked])
    is_nonspeech = np.arange(len(both.scores)) < len(scores)
    return Fit(choose_contrast(_as_labels(both.scores), is_nonspeech, order), both.pooled)


def _as_labels(scores: Sequence[Score]) -> Sequence[Labels]:
    return cast("Sequence[Labels]", scores)  # choose_contrast reads nsp, hr and text_fp, which both have


def classifier_f1(latents: np.ndarray, positive: np.ndarray, features: int, *, seed: int = 0) -> Rate:
    """F1 out of five folds with the `features` largest |beta| of a fit on all (0: all), both inside the fold.

    latents: (clips, n_latents); positive: (clips,) bool. The interval is over clips; NaN with fewer than two
    clips in a class.
    """
    folds = min(5, int(positive.sum()), int((~positive).sum()))
    if folds < 2:
        return Rate(float("nan"), float("nan"), float("nan"))
    scaled = latents / np.maximum(np.abs(latents).max(axis=0, keepdims=True), 1e-12)
    guess = np.zeros(len(positive), dtype=bool)
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(scaled, positive):
        columns = np.arange(scaled.shape[1])
        if 0 < features < scaled.shape[1]:
            columns = top_latents(_regression(scaled[train], positive[train]).coef_[0], features)
        fitted = _regression(scaled[train][:, columns], positive[train])
        guess[test] = fitted.predict(scaled[test][:, columns])
    hits = (guess & positive).astype(float)
    # 2 TP / (2 TP + FP + FN) is a ratio of sums over clips
    return bootstrap_ratio(2 * hits, guess.astype(float) + positive, seed=seed)


def _regression(x: np.ndarray, positive: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=1.0, max_iter=5000, class_weight="balanced").fit(x, positive)


# -- edits


class Edits:
    """Edits of conditions, made when first asked for; parts that conditions share are the same objects."""

    def __init__(
        self,
        blocks: int,
        saes: Mapping[int, SparseAutoencoder],
        fits: Mapping[str, Fit],
        layer: int | None = None,
    ):
        """fits: by data set, "" for the follow-up's. layer: see `layers_of`."""
        self._blocks, self._saes, self._fits, self._layer = blocks, saes, fits, layer
        self._betas: dict[tuple[str, int], np.ndarray] = {}
        self._paths: dict[int, LatentEdit] = {}

    def of(self, condition: Condition) -> tuple[Edit, ...]:
        """In ascending order of layers, to be applied at alpha 1; none for "plain".

        Raises UsageError with the reason where it cannot be made: no SAE of the layer, no clips to fit on.
        """
        layers = layers_of(condition.where, self._blocks, self._layer)
        if condition.method == "plain":
            return ()
        if condition.method == "reconstruction":
            return (self._path(layers[0]),)
        fit = self._fits.get(condition.vector)
        if fit is None:
            raise UsageError(f"there is nothing to fit on from {condition.vector or 'any data set'}")
        return tuple(edit for layer in layers for edit in self._at(condition, fit, layer))

    def layer_of(self, condition: Condition) -> int:
        """The first layer that a condition works on."""
        return layers_of(condition.where, self._blocks, self._layer)[0]

    def _at(self, condition: Condition, fit: Fit, layer: int) -> tuple[Edit, ...]:
        pooled, positive = fit.pooled[layer], fit.contrast.positive
        if condition.method in ("s-vector", "activation"):
            make = audiosae.svector if condition.method == "s-vector" else followup.activation_vector
            return (replace(make(layer, pooled.mean, positive), strength=condition.alpha),)
        sae, beta = self._sae(layer), self._beta(condition.vector, fit, layer)
        if condition.method == "latents":
            edit = followup.latent_edit(sae, beta, pooled.mean_activation, condition.k)
            return (replace(edit, strength=condition.alpha),)
        # decoder(f + alpha s) = decoder(f) + alpha W_dec s: the reconstruction is shared, the rest constant
        values = audiosae.reconstruction_edit(sae, beta, condition.k).values
        return (self._path(layer), Shift(layer, values @ sae.W_dec.detach(), condition.alpha))

    def _path(self, layer: int) -> LatentEdit:
        """The SAE in the path, nothing steered."""
        if layer not in self._paths:
            sae = self._sae(layer)
            nothing = torch.zeros(sae.n_latents)
            self._paths[layer] = LatentEdit.from_sae(sae, None, nothing, reconstruct=True)
        return self._paths[layer]

    def _sae(self, layer: int) -> SparseAutoencoder:
        if layer not in self._saes:
            raise UsageError(f"there is no SAE of layer {layer}")
        return self._saes[layer]

    def _beta(self, vector: str, fit: Fit, layer: int) -> np.ndarray:
        if (vector, layer) not in self._betas:
            # one fold: no cross-validation, classifier_f1 does that
            self._betas[vector, layer] = regress(
                fit.pooled[layer].latents, fit.contrast.positive, folds=1
            ).beta
        return self._betas[vector, layer]


def readable(clips: Sequence[Clip], scores: Mapping[str, Mapping[str, Score]]) -> list[Clip]:
    """The clips that could be scored. Raises AudioError if none could."""
    kept = [clip for clip in clips if clip.id in scores]
    if clips and not kept:
        raise AudioError(f"none of {len(clips)} clips could be read, such as {clips[0].id}")
    return kept
