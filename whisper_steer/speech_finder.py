"""The gate as a speech finder: where in a recording somebody speaks, by the encoder's own features.

The encoder runs over the recording once, up to the last block that the gate reads, in overlapping windows.
Nothing is edited in this pass, whatever the model is steered with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from whisper.audio import N_FRAMES, N_SAMPLES, SAMPLE_RATE, log_mel_spectrogram

from .errors import UsageError
from .gate import Gate
from .registry import registry_of
from .stretches import FRAME_MS, GateVad, speech_stretches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attach import Handle
    from .backends import Progress

_BATCH = 8  # windows that are encoded together
_MEL_FRAMES = 2  # of 10 ms, per encoder frame


@dataclass(frozen=True)
class Found:
    """Where somebody speaks in a recording of `duration` seconds.

    stretches: (start, end), seconds, ascending, not overlapping. logits: (frames,), per 20 ms frame the
    gate's logit that *nobody* speaks.
    """

    stretches: tuple[tuple[float, float], ...]
    logits: NDArray[np.float64]
    duration: float

    def least(self, start: float, end: float) -> float:
        """The logit of the frame most like speech from `start` to `end` seconds; infinite if there is no
        frame."""
        first = round(start * 1000 / FRAME_MS)
        chosen = self.logits[first : max(round(end * 1000 / FRAME_MS), first + 1)]
        return float(chosen.min()) if len(chosen) else float("inf")


def find_speech(
    model: Any,
    handle: Handle,
    samples: NDArray[np.float32],
    duration: float,
    options: GateVad,
    progress: Progress | None = None,
) -> Found:
    """Where somebody speaks, by the gate of `handle`, which must be attached to `model`.

    samples: (n,), mono, 16 kHz, `duration` seconds. progress: called with (seconds done, seconds in all).
    Raises UsageError: the steering has no gate.
    """
    gate = handle.steering.gate
    if gate is None:
        raise UsageError(
            f"vad 'gate' needs a steering with a gate, {handle.steering.name} has none: pass another one, "
            "or leave vad out"
        )
    encoder = _encoder_of(model)
    gate = handle.on(encoder.conv1.weight.device).gate or gate
    logits = frame_logits(encoder, gate, samples, options, progress)
    frames = speech_stretches(1 / (1 + np.exp(np.clip(logits, -700, 700))), options)
    seconds = FRAME_MS / 1000
    stretches = tuple(
        # the last frame stands for what is left of the recording, be it a part of a frame or more
        (round(first * seconds, 2), duration if end == len(logits) else round(end * seconds, 2))
        for first, end in frames
    )
    return Found(stretches, logits, duration)


@dataclass(frozen=True, eq=False)
class Encoder:
    """What all runtimes' encoders have: two convolutions, positions (frames, d_model), and blocks that are
    run one by one, unsteered."""

    conv1: Any
    conv2: Any
    positions: Tensor
    run_block: Callable[[int, Tensor], Tensor]

    def gate_parts(self, gate: Gate, mel: Tensor) -> Tensor:
        """(batch, n_mels, 2 n) -> (batch, n): the sum of the gate's parts, without intercept and
        smoothing."""
        weight = self.conv1.weight
        x = F.gelu(self.conv1(mel.to(weight.device, weight.dtype)))
        x = F.gelu(self.conv2(x)).permute(0, 2, 1)
        x = (x + self.positions[: x.shape[1]]).to(x.dtype)
        parts = x.new_zeros(x.shape[:2], dtype=torch.float32)
        for layer in range(gate.layer + 1):
            x = self.run_block(layer, x)
            if layer in gate.layers:
                parts = parts + gate.part(layer, x)
        return parts


def frame_logits(
    encoder: Encoder,
    gate: Gate,
    samples: NDArray[np.float32],
    options: GateVad,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """(n,) samples at 16 kHz -> (frames,): per 20 ms the logit that nobody speaks. progress: see
    `find_speech`.

    The log-mel is taken over the whole recording, as by whisper.transcribe.
    """
    mel = log_mel_spectrogram(
        np.ascontiguousarray(samples, dtype=np.float32), encoder.conv1.weight.shape[1], padding=N_SAMPLES
    )
    content = mel.shape[-1] - N_FRAMES
    count, seconds = -(-content // _MEL_FRAMES), len(samples) / SAMPLE_RATE
    if count == 0:
        return np.zeros(0)
    size = min(round(options.window_s * 1000 / FRAME_MS), len(encoder.positions))
    margin = min(round(options.overlap_s * 1000 / FRAME_MS), size // 2) // 2
    if count < size:  # as everywhere in Whisper, zeros follow what is too short
        mel = F.pad(mel[:, : _MEL_FRAMES * count], (0, _MEL_FRAMES * (size - count)))
    starts = [*range(0, max(count - size, 0), size - 2 * margin), max(count - size, 0)]
    parts = torch.zeros(count)
    with torch.no_grad():
        for place in range(0, len(starts), _BATCH):
            chosen = starts[place : place + _BATCH]
            windows = torch.stack([mel[:, _MEL_FRAMES * s : _MEL_FRAMES * (s + size)] for s in chosen])
            for start, part in zip(chosen, encoder.gate_parts(gate, windows).cpu(), strict=True):
                # of frames that two windows share, each window keeps those farther from its edge
                skip = margin if start else 0
                end = min(start + size, count)
                parts[start + skip : end] = part[skip : end - start]
            if progress is not None:
                progress(min(end * FRAME_MS / 1000, seconds), seconds)
        return gate.smoothed(parts.unsqueeze(0))[0].double().numpy()


def _encoder_of(model: Any) -> Encoder:
    """Of a steered openai-whisper, transformers or faster-whisper model."""
    registry = registry_of(model)
    if registry is None:  # faster-whisper's: the encoder in PyTorch, from the same weights
        encoder, _ = model.model._torch_encoder()
        return Encoder(
            encoder.conv1, encoder.conv2, encoder.positional_embedding, lambda n, x: encoder.blocks[n](x)
        )
    encoder, run_block = registry.unsteered_encoder()
    positions = getattr(encoder, "positional_embedding", None)
    if positions is None:  # transformers'
        positions = encoder.embed_positions.weight
    return Encoder(encoder.conv1, encoder.conv2, positions, run_block)
