"""Calibration clips pooled over time, with the labels of plain Whisper: what steering peers are fitted on.

One encoder pass per clip, kept in setup.cache: all of them share it.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.methods import Setup, Unavailable
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.edit_fit import Contrast, PooledClips, Regression
    from whisper_steer.sae import SparseAutoencoder

_BATCH = 8


@dataclass(frozen=True)
class Pool:
    """The clips of a contrast for one layer.

    Attributes:
        clips: one row per clip of the contrast; without an SAE its latents are (clips, 0).
        hallucinated: (clips,) bool.
        reason: what "hallucinated" means here, and why, in words.
    """

    layer: int
    contrast: Contrast
    clips: PooledClips

    @property
    def hallucinated(self) -> np.ndarray:
        return self.contrast.positive

    @property
    def reason(self) -> str:
        return self.contrast.reason


def last_layer(setup: Setup) -> int:
    """The encoder's last block, 0-based."""
    return int(setup.model.dims.n_audio_layer) - 1


def sae_of(setup: Setup, layer: int) -> SparseAutoencoder:
    """The layer's SAE. Raises Unavailable (there is none, or its codes have no threshold form)."""
    sae = setup.saes[layer]
    if sae.activation == "topk":
        raise Unavailable("its latents are edited by their thresholds, and the SAEs are of the 'topk' kind")
    return sae


def nonspeech_and_speech(setup: Setup) -> tuple[list[Clip], list[Clip]]:
    """The calibration clips to fit on, by kind. Raises Unavailable if there is no non-speech clip."""
    clips = setup.taught
    nonspeech = [clip for clip in clips if clip.kind == "nonspeech"]
    if not nonspeech:
        raise Unavailable("it is fitted on non-speech clips, and the calibration split has none")
    return nonspeech, [clip for clip in clips if clip.kind != "nonspeech"]


def pool(setup: Setup, layer: int, order: Sequence[str]) -> Pool:
    """The calibration clips by the first definition of "hallucinated" in `order` ("nsp", "hr", "text") that
    splits the non-speech clips; where none does, against as many speech clips (edit_fit.choose_contrast).

    Raises:
        Unavailable: the calibration clips cannot be split in any of these ways.
    """
    key = f"pool of layer {layer} by {','.join(order)}"
    if key not in setup.memory:
        clips, contrast = _contrast(setup, order)
        setup.memory[key] = Pool(layer, contrast, _pooled(setup, layer, clips))
    found: Pool = setup.memory[key]
    return found


def regression(setup: Setup, pooled: Pool) -> Regression:
    """Logistic regression of hallucinated on pooled latents, fitted once per layer and contrast."""
    from calibration.edit_fit import regress

    key = f"regression of layer {pooled.layer} on {pooled.contrast.name}"
    if key not in setup.memory:
        setup.memory[key] = regress(pooled.clips.latents, pooled.hallucinated)
    found: Regression = setup.memory[key]
    return found


def _contrast(setup: Setup, order: Sequence[str]) -> tuple[list[Clip], Contrast]:
    """The clips that take part, and the contrast over exactly these."""
    from calibration.edit_fit import choose_contrast
    from calibration.evaluate import evenly

    nonspeech, speech = nonspeech_and_speech(setup)
    labels = [setup.labels[clip.id] for clip in nonspeech]
    try:
        return nonspeech, choose_contrast(labels, np.ones(len(nonspeech), dtype=bool), order)
    except UsageError:
        pass  # all alike: speech clips are needed for a contrast
    chosen = evenly(speech, len(nonspeech))
    labels += [setup.labels[clip.id] for clip in chosen]
    is_nonspeech = np.arange(len(labels)) < len(nonspeech)
    try:
        return [*nonspeech, *chosen], choose_contrast(labels, is_nonspeech, order)
    except UsageError as error:
        raise Unavailable(str(error)) from error


def _pooled(setup: Setup, layer: int, clips: Sequence[Clip]) -> PooledClips:
    """From the cache if it was made of the same model, SAE and audio."""
    from calibration.edit_fit import PooledClips

    try:
        sae = setup.saes[layer]
    except Unavailable:
        sae = None
    path = setup.cache / f"pooled-layer_{layer:02d}-{_fingerprint(setup, sae, clips)}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            return PooledClips(*(arrays[name] for name in ("latents", "mean", "active_sum", "active_count")))
    pooled = _pool_clips(setup, layer, sae, clips)
    _save(path, pooled)
    return pooled


def _fingerprint(setup: Setup, sae: SparseAutoencoder | None, clips: Sequence[Clip]) -> str:
    from whisper_steer.fileformat import encoder_sha256

    digest = hashlib.sha256(encoder_sha256(setup.model).encode())
    for tensor in () if sae is None else sae.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    for clip in clips:
        # plain Whisper's scores tell two recordings of one name apart without reading the audio
        transcript = setup.labels[clip.id].transcript
        digest.update(repr((clip.id, transcript.seconds, transcript.greedy)).encode())
    return digest.hexdigest()[:16]


def _pool_clips(
    setup: Setup, layer: int, sae: SparseAutoencoder | None, clips: Sequence[Clip]
) -> PooledClips:
    """Every clip's first 30 s window, padding left out."""
    import torch
    from tqdm import tqdm

    from calibration.activations import cut_window, encode_windows, padded_log_mel, true_frames
    from calibration.edit_fit import pool_frames, stack_pooled

    parts = []
    nothing = np.zeros(0)
    with tqdm(
        total=len(clips), desc="pooling", unit="clip", file=sys.stderr, disable=not setup.progress
    ) as bar:
        for start in range(0, len(clips), _BATCH):
            audios = [setup.audio(clip) for clip in clips[start : start + _BATCH]]
            mels = [cut_window(*padded_log_mel(audio, setup.model.dims.n_mels), seek=0) for audio in audios]
            encoded = encode_windows(setup.model, torch.stack(mels), [layer])[0].cpu()
            for frames, audio in zip(encoded, audios, strict=True):
                x = frames[: max(1, true_frames(len(audio)))]
                if sae is None:
                    parts.append((nothing, x.mean(dim=0).numpy(), nothing, nothing))
                else:
                    parts.append(pool_frames(sae, x))
                bar.update()
    return stack_pooled(parts)


def _save(path: Path, pooled: PooledClips) -> None:
    from benchmarks.files import write_whole

    buffer = io.BytesIO()
    np.savez(
        buffer,
        latents=pooled.latents,
        mean=pooled.mean,
        active_sum=pooled.active_sum,
        active_count=pooled.active_count,
    )
    write_whole(path, buffer.getvalue())
