"""Audio -> encoder activations of every layer, from one forward pass, with padding told apart by true length.

Whisper always sees a 30 s window: `whisper.transcribe` computes the log-mel of the audio followed by 30 s of
digital silence, cuts 3,000 mel frames and fills the rest with zeros. Activations are taken from exactly
that window; what lies behind the end of the audio is padding and never reaches a statistic (see
`true_frames`).

Shapes: mel (n_mels, 3000), activations (layers, batch, frames, d_model); one encoder frame is 20 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from whisper.audio import N_FRAMES, N_SAMPLES, SAMPLE_RATE, log_mel_spectrogram, pad_or_trim

from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from whisper.model import Whisper

FRAME_SAMPLES = 320  # one encoder frame: the second convolution's stride 2 times a hop of 160 samples
MAX_FRAMES = N_SAMPLES // FRAME_SAMPLES  # 1,500 encoder frames in a 30 s window
FRAMES_PER_SECOND = SAMPLE_RATE // FRAME_SAMPLES


class AudioClip(Protocol):
    """The part of `calibration.corpus.Clip` that this file needs."""

    @property
    def id(self) -> str: ...

    def load(self) -> np.ndarray: ...


def true_frames(n_samples: int) -> int:
    """Encoder frames that a clip of `n_samples` (16 kHz) covers in one 30 s window; the rest is padding."""
    return min(math.ceil(n_samples / FRAME_SAMPLES), MAX_FRAMES)


def padded_log_mel(audio: np.ndarray, n_mels: int) -> tuple[Tensor, int]:
    """The log-mel (n_mels, frames) that `whisper.transcribe` slices, and the number of its mel frames with
    content.

    The maximum that normalises the spectrogram is taken over this clip alone, as at inference.
    """
    mel = log_mel_spectrogram(np.ascontiguousarray(audio, dtype=np.float32), n_mels, padding=N_SAMPLES)
    return mel, mel.shape[-1] - N_FRAMES


def cut_window(mel: Tensor, content_frames: int, seek: int) -> Tensor:
    """The window (n_mels, 3000) that `whisper.transcribe` decodes at mel frame `seek`."""
    size = min(N_FRAMES, content_frames - seek)
    return pad_or_trim(mel[:, seek : seek + size], N_FRAMES)


def window_mels(audio: np.ndarray, n_mels: int) -> Tensor:
    """Consecutive 30 s windows (windows, n_mels, 3000) of a clip; at least one, however short the clip is."""
    mel, content = padded_log_mel(audio, n_mels)
    seeks = range(0, max(content, 1), N_FRAMES)
    return torch.stack([cut_window(mel, content, seek) for seek in seeks])


@contextmanager
def _captured(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of some encoder blocks for the forward passes inside the `with`."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            outputs[layer] = output

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def check_layers(model: Whisper, layers: Sequence[int] | None) -> list[int]:
    """All layers for None; otherwise the given 0-based ones, checked.

    Raises:
        UsageError: a layer that the model does not have.
    """
    count = model.dims.n_audio_layer
    if layers is None:
        return list(range(count))
    for layer in layers:
        if not 0 <= layer < count:
            raise UsageError(
                f"layer {layer} does not exist: the encoder has layers 0 to {count - 1} (0-based)"
            )
    return list(layers)


@torch.no_grad()
def encode_windows(model: Whisper, mels: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """Block outputs (layers, batch, 1500, d_model), float32, for mels (batch, n_mels, 3000): one forward
    pass.
    """
    wanted = check_layers(model, layers)
    parameter = next(model.encoder.parameters())
    with _captured(list(model.encoder.blocks), wanted) as outputs:
        model.encoder(mels.to(parameter.device, parameter.dtype))
    return torch.stack([outputs[layer].float() for layer in wanted])


@torch.no_grad()
def finish_encoder(model: Whisper, x: Tensor, layer: int) -> Tensor:
    """The encoder's output for activations x (batch, 1500, d_model) standing behind block `layer`."""
    for block in list(model.encoder.blocks)[layer + 1 :]:
        x = block(x)
    return model.encoder.ln_post(x)


@dataclass(frozen=True)
class ClipActivations:
    """Activations of one clip's windows.

    Attributes:
        windows: (layers, windows, 1500, d_model) float32, padding included.
        n_true: encoder frames of each window that hold audio.
    """

    windows: Tensor
    n_true: tuple[int, ...]

    @property
    def frames(self) -> Tensor:
        """(layers, frames, d_model): the frames that hold audio, windows joined."""
        return torch.cat([self.windows[:, i, :n] for i, n in enumerate(self.n_true)], dim=1)


def encode_clip(model: Whisper, audio: np.ndarray, layers: Sequence[int] | None = None) -> ClipActivations:
    """All layers' activations of a clip at 16 kHz, one forward pass per 30 s window."""
    mels = window_mels(audio, model.dims.n_mels)
    n_true = tuple(true_frames(len(audio) - i * N_SAMPLES) for i in range(len(mels)))
    windows = torch.cat([encode_windows(model, mel[None], layers) for mel in mels], dim=1)
    return ClipActivations(windows, n_true)
