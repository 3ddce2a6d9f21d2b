"""The missing threshold of an imported BatchTopK SAE: set on audio so that k latents are active per frame."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.adapters import AudioEncoder
from calibration.sae_quality import calibrate_threshold, domain_quality
from whisper_steer.audio import load_audio
from whisper_steer.errors import AudioError
from whisper_steer.interop.dictionary_learning import THRESHOLD_MISSING
from whisper_steer.sae import SparseAutoencoder

logger = logging.getLogger("whisper_steer")


def calibrate_missing(
    saes: Sequence[SparseAutoencoder],
    encoder: AudioEncoder,
    files: Sequence[Path],
    *,
    max_frames: int = 20_000,
    per_file: int = 400,
) -> None:
    """Set theta of every SAE whose metadata say "theta_missing", in place; the others are left as they are.

    One pass over the files serves all layers: at most `per_file` frames (20 ms each) of a file, evenly
    spread, until there are `max_frames`. metadata["theta_calibration"] then tells target_l0 (k), reached_l0,
    theta, frames and clips; the flag goes. Let the files be what the SAE is for, speech and non-speech in
    equal shares: a threshold from speech alone is another one.

    Unreadable files are skipped with a warning. Raises AudioError if none can be read.
    """
    waiting = [sae for sae in saes if sae.metadata.get(THRESHOLD_MISSING)]
    if not waiting:
        return
    layers = sorted({sae.layer for sae in waiting})
    frames, clips = _frames(encoder, layers, files, max_frames, per_file)
    for sae in waiting:
        x = frames[layers.index(sae.layer)].float()
        theta = calibrate_threshold(sae, x, int(sae.k or 0))
        del sae.metadata[THRESHOLD_MISSING]
        sae.metadata["theta_calibration"] = {
            "target_l0": sae.k,
            "reached_l0": domain_quality(sae, x).l0,
            "theta": theta,
            "frames": len(x),
            "clips": clips,
        }


def _frames(
    encoder: AudioEncoder, layers: Sequence[int], files: Sequence[Path], max_frames: int, per_file: int
) -> tuple[Tensor, int]:
    """((layers, frames, d_model) float16 on the CPU, number of files read)."""
    kept: list[Tensor] = []
    total = 0
    for file in tqdm(files, desc="threshold", unit="file", leave=False, disable=None):
        try:
            (activations,) = encoder.encode([load_audio(file)], layers)
        except AudioError as error:
            logger.warning("skipped: %s", error)
            continue
        true = activations.shape[1]
        n = min(true, per_file, max_frames - total)
        kept.append(activations[:, torch.linspace(0, max(true - 1, 0), n).long()].half().cpu())
        total += n
        if total >= max_frames:
            break
    if total == 0:
        raise AudioError(f"none of {len(files)} audio files can be used to set the threshold")
    return torch.cat(kept, dim=1), len(kept)
