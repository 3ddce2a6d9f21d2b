"""Fits MeanAblation: what a layer's stream is on average where nothing sounds, position by position.

Speech clips are put somewhere in a 30 s window of digital silence. The frames well away from the speech, the
padding that every short recording ends with among them, are what a frame is replaced by where the gate finds
that nobody speaks. They differ from position to position, because the encoder's positions do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from calibration.activations import (
    MAX_FRAMES,
    check_layers,
    cut_window,
    encode_windows,
    padded_log_mel,
    true_frames,
)
from whisper_steer.errors import UsageError
from whisper_steer.steering import MeanAblation

if TYPE_CHECKING:
    from whisper.model import Whisper

RATE = 16_000
MARGIN = 25  # frames (0.5 s) on either side of the speech that attention and its reverberation still colour
MIN_COUNT = 4  # windows that a position's own mean needs; below it the layer's mean is taken
QUIET_QUANTILE = 0.99  # share of silent frames that the tolerance leaves alone


def fit_silence(
    model: Whisper,
    speech: Sequence[np.ndarray],
    layers: Sequence[int] | None = None,
    *,
    seed: int = 0,
    batch: int = 8,
    progress: bool = True,
) -> dict[int, MeanAblation]:
    """By layer (None: all): means (1500, d_model) and the tolerance that most silent frames are within.

    speech: clips (n,) float32 at 16 kHz; what exceeds 20 s is cut. Half of them give the means, the other
    half the tolerance.

    Raises UsageError for fewer than 8 clips.
    """
    wanted = check_layers(model, layers)
    if len(speech) < 2 * MIN_COUNT:
        raise UsageError(
            f"{len(speech)} speech clips: expected at least {2 * MIN_COUNT} to learn what silence looks like"
        )
    windows = _spread(speech, np.random.default_rng(seed))
    sums = torch.zeros(len(wanted), MAX_FRAMES, model.dims.n_audio_state, dtype=torch.float64)
    counts = torch.zeros(MAX_FRAMES, dtype=torch.float64)
    distances: list[torch.Tensor] = []
    with tqdm(total=len(speech), desc="silence", unit="clip", disable=not progress) as bar:
        for frames, silent in _encoded(model, windows[::2], wanted, batch):
            sums[:, silent] += frames[:, silent]
            counts[silent] += 1
            bar.update()
        overall = sums.sum(dim=1, keepdim=True) / counts.sum().clamp_min(1)
        own = sums / counts.clamp_min(1)[:, None]
        known = counts >= MIN_COUNT
        mean = torch.where(known[:, None], own, overall)
        for frames, silent in _encoded(model, windows[1::2], wanted, batch):
            away = (frames - mean).norm(dim=-1) / mean.norm(dim=-1).clamp_min(1e-12)
            distances.append(away[:, silent & known])
            bar.update()
    joined = torch.cat(distances, dim=1)
    return {
        layer: MeanAblation(
            layer,
            mean[n].float(),
            strength=1.0,
            tolerance=float(np.quantile(joined[n].numpy(), QUIET_QUANTILE)),
        )
        for n, layer in enumerate(wanted)
    }


@dataclass(frozen=True)
class _Placed:
    """Speech somewhere in a window: the audio from the window's start on, and the frames up to which, and
    from which on, nothing sounds."""

    audio: np.ndarray
    until: int
    since: int


def _spread(speech: Sequence[np.ndarray], rng: np.random.Generator) -> list[_Placed]:
    """The clips at random places, so that every position is silent in some windows."""
    placed = []
    for clip in speech:
        clip = clip[: 20 * RATE]
        lead = int(rng.integers(0, 30 * RATE - len(clip)))
        audio = np.concatenate([np.zeros(lead, np.float32), clip])
        placed.append(_Placed(audio, true_frames(lead) - MARGIN, true_frames(len(audio)) + MARGIN))
    return placed


def _encoded(
    model: Whisper, windows: Sequence[_Placed], layers: Sequence[int], batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of every window: activations (layers, 1500, d_model) float64, and which frames (1500,) are silent."""
    for start in range(0, len(windows), batch):
        chosen = windows[start : start + batch]
        mels = [cut_window(*padded_log_mel(one.audio, model.dims.n_mels), 0) for one in chosen]
        encoded = encode_windows(model, torch.stack(mels), layers)
        for row, one in enumerate(chosen):
            silent = torch.zeros(MAX_FRAMES, dtype=torch.bool)
            silent[: max(one.until, 0)] = True
            silent[min(one.since, MAX_FRAMES) :] = True
            yield encoded[:, row].double().cpu(), silent
