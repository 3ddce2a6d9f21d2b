"""What all audio encoders share: audio is cut into pieces, pieces pass the model in batches, hooks collect
what the blocks put out.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram

from calibration.activations import FRAME_SAMPLES, MAX_FRAMES, cut_window, true_frames
from whisper_steer.errors import AudioError, UsageError

AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)

# hooks sit on the shared model: two threads must not encode at the same time
_FORWARD = threading.Lock()


@dataclass(frozen=True)
class Piece:
    """What the model sees at once of one audio: `inputs` is a mel (n_mels, 3000) or samples (n,)."""

    owner: int
    inputs: Tensor
    n_frames: int


class BlockEncoder(ABC):
    """Cuts audio into pieces, runs them in batches and collects what the blocks put out.

    Subclasses say how audio becomes pieces (`_cut`) and how a batch of them passes the model (`_forward`).
    """

    name: str
    family: str
    n_layers: int
    d_model: int
    frame_samples: int = FRAME_SAMPLES
    max_samples: int = N_SAMPLES

    def __init__(self, network: nn.Module, blocks: Iterable[nn.Module], autocast: torch.dtype | None):
        if autocast is not None and autocast not in AUTOCAST_DTYPES:
            expected = ", ".join(map(str, AUTOCAST_DTYPES))
            raise UsageError(f"autocast {autocast} is not supported: expected {expected}, or None for none")
        self._network = network.eval()
        self._blocks = list(blocks)
        self._autocast = autocast
        self._metadata: dict[str, Any] | None = None
        self.n_layers = len(self._blocks)

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._network.parameters()).dtype

    def metadata(self) -> dict[str, Any]:
        """base_model, encoder_sha256, d_model, n_layers, family, precision; the checksum is taken once."""
        if self._metadata is None:
            precision = str(self._autocast or self._dtype).removeprefix("torch.")
            self._metadata = {**self._identity(), "family": self.family, "precision": precision}
        return dict(self._metadata)

    def encode(self, audios: Sequence[np.ndarray], layers: Sequence[int]) -> list[Tensor]:
        """Frames (len(layers), true frames, d_model) of every audio (samples,) at 16 kHz, float32, on
        `device`: all layers from one forward pass, which ends behind the last block asked for.

        Audio longer than `max_samples` is encoded in consecutive pieces and its frames are joined; at most
        len(audios) pieces share a pass. Audio too short for a frame has none.

        Raises UsageError (layers), AudioError (more than one channel, values that are not finite).
        """
        wanted = self._checked(layers)
        pieces = [
            piece
            for owner, audio in enumerate(audios)
            for piece in self._cut(owner, _samples(audio))
            if piece.n_frames > 0
        ]
        parts: dict[int, Tensor] = {}
        for batch in self._batches(pieces, max(len(audios), 1)):
            outputs = self._run([pieces[index] for index in batch], wanted)
            for row, index in enumerate(batch):
                length = pieces[index].n_frames
                parts[index] = torch.stack([outputs[layer][row, :length].float() for layer in wanted])
        return [
            self._joined([parts[i] for i, piece in enumerate(pieces) if piece.owner == owner], len(wanted))
            for owner in range(len(audios))
        ]

    def _joined(self, parts: list[Tensor], n_layers: int) -> Tensor:
        if not parts:
            return torch.zeros(n_layers, 0, self.d_model, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _checked(self, layers: Sequence[int]) -> list[int]:
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise UsageError(
                    f"layer {layer} does not exist: the encoder has layers 0 to {self.n_layers - 1} (0-based)"
                )
        if not layers:
            raise UsageError("no layers to encode: give at least one (0-based)")
        return list(layers)

    def _run(self, pieces: list[Piece], layers: list[int]) -> dict[int, Tensor]:
        with _FORWARD, torch.no_grad(), self._precision(), _captured(self._blocks, layers) as outputs:
            try:
                self._forward(pieces)
            except _LastLayerReached:
                pass
        return outputs

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    def _batches(self, pieces: list[Piece], size: int) -> Iterator[list[int]]:
        """Indices of the pieces that pass the model together."""
        for start in range(0, len(pieces), size):
            yield list(range(start, min(start + size, len(pieces))))

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What `metadata` gives."""

    @abstractmethod
    def _cut(self, owner: int, audio: np.ndarray) -> Iterator[Piece]:
        """What of a clip passes the model at once."""

    @abstractmethod
    def _forward(self, pieces: list[Piece]) -> None:
        """Pass pieces through the model; the blocks' outputs are caught by hooks."""


class LogMelEncoder(BlockEncoder):
    """30 s windows of log-mel, cut exactly as `whisper.transcribe` does without timestamps."""

    family = "whisper"

    def __init__(
        self,
        network: nn.Module,
        encoder: nn.Module,
        blocks: Iterable[nn.Module],
        *,
        n_mels: int,
        n_positions: int,
        autocast: torch.dtype | None,
    ):
        super().__init__(network, blocks, autocast)
        if n_positions != MAX_FRAMES:
            raise UsageError(
                f"a Whisper with {n_positions} positions cannot hear 30 s at once: expected {MAX_FRAMES}"
            )
        self._encoder, self.n_mels = encoder, n_mels

    def _cut(self, owner: int, audio: np.ndarray) -> Iterator[Piece]:
        # on the model's device: beside a GPU the spectrogram would be the slow part
        mel = log_mel_spectrogram(audio, self.n_mels, padding=N_SAMPLES, device=self.device)
        content = mel.shape[-1] - N_FRAMES
        for number, seek in enumerate(range(0, max(content, 1), N_FRAMES)):
            yield Piece(owner, cut_window(mel, content, seek), true_frames(len(audio) - number * N_SAMPLES))

    def _forward(self, pieces: list[Piece]) -> None:
        self._encoder(torch.stack([piece.inputs for piece in pieces]).to(self._dtype))


class _LastLayerReached(Exception):
    """Ends a forward pass whose remaining blocks nobody asked for."""


@contextmanager
def _captured(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the outputs of blocks in the forward pass inside the `with`; ends it behind the last one."""
    outputs: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # WavLM's blocks hand their position bias on beside the hidden states
            outputs[layer] = output[0] if isinstance(output, tuple) else output
            if layer == last:
                raise _LastLayerReached

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in sorted(set(layers))]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _samples(audio: np.ndarray) -> np.ndarray:
    """Checked, float32, in memory that torch may share."""
    if audio.ndim != 1:
        raise AudioError(f"audio of shape {audio.shape}: expected one channel, (samples,) at 16 kHz")
    if not np.isfinite(audio).all():
        raise AudioError("audio with values that are not finite (NaN or infinity): expected samples in -1..1")
    return np.require(audio, np.float32, ["C", "W"])
