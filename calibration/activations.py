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


def iterate_windows(
    model: Whisper, audios: Iterator[np.ndarray], *, batch: int = 8, layers: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, int]]:
    """(activations (layers, 1500, d_model), true frames) of every audio's first window, in batches."""
    mels: list[Tensor] = []
    lengths: list[int] = []

    def flush() -> Iterator[tuple[Tensor, int]]:
        encoded = encode_windows(model, torch.stack(mels), layers)
        for i, length in enumerate(lengths):
            yield encoded[:, i], length
        mels.clear()
        lengths.clear()

    for audio in audios:
        mel, content = padded_log_mel(audio, model.dims.n_mels)
        mels.append(cut_window(mel, content, 0))
        lengths.append(true_frames(len(audio)))
        if len(mels) == batch:
            yield from flush()
    if mels:
        yield from flush()


class WindowPlan:
    """Draws the 30 s windows that one round of SAE training looks at; the same (seed, round) draws the same
    ones.

    Most windows are filled with several clips in a row (short pauses between them), because a window with
    one short clip costs the same forward pass and is padding for the rest; the others hold one clip alone,
    so that frames near padding and in isolation are seen as well.
    """

    def __init__(
        self,
        clips: Sequence[AudioClip],
        *,
        seed: int,
        packed_share: float = 0.75,
        cache_bytes: int = 512 * 2**20,
    ):
        if not clips:
            raise UsageError("no training clips: give --data or a corpus with a training split")
        self.clips = list(clips)
        self.seed = seed
        self.packed_share = packed_share
        # clips come back in every round, and loading one may mean synthesising it: keep what fits, as float16
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = cache_bytes

    def windows(self, round_index: int) -> Iterator[np.ndarray]:
        """Endless stream of audio arrays of at most 30 s."""
        rng = np.random.default_rng([self.seed, round_index])
        while True:
            if rng.random() < self.packed_share:
                yield self._packed(rng)
            else:
                yield self._draw(rng)[:N_SAMPLES]

    def _load(self, index: int) -> np.ndarray:
        if index not in self._cache:
            # rounded to float16 whether it is kept or not, so that the cache never changes a result
            audio = np.asarray(self.clips[index].load()).astype(np.float16)
            if audio.nbytes > self._cache_left:
                return audio.astype(np.float32)
            self._cache[index] = audio
            self._cache_left -= audio.nbytes
        return self._cache[index].astype(np.float32)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        audio = self._load(int(rng.integers(len(self.clips))))
        if len(audio) > N_SAMPLES:  # a random 30 s piece of a longer clip, so that its end is heard too
            start = int(rng.integers(len(audio) - N_SAMPLES + 1))
            audio = audio[start : start + N_SAMPLES]
        return audio

    def _packed(self, rng: np.random.Generator) -> np.ndarray:
        pieces: list[np.ndarray] = []
        total = 0
        while total < N_SAMPLES:
            pause = np.zeros(int(rng.integers(0, SAMPLE_RATE // 2)), dtype=np.float32)
            # loudness differs between clips; a window is normalised by its maximum, so level them roughly
            clip = self._draw(rng)
            peak = float(np.abs(clip).max(initial=0.0))
            if peak > 0:
                clip = clip * np.float32(0.5 * 10 ** (-rng.uniform(0, 20) / 20) / peak)
            pieces += [clip, pause]
            total += len(clip) + len(pause)
        return np.concatenate(pieces)[:N_SAMPLES]


class ActivationBuffer:
    """Frames of all layers in memory: (layers, capacity, d_model) float32, filled by windows, served
    shuffled.

    The capacity follows from `max_bytes`, rounded down to whole batches, so the memory is bounded and known
    before the first window is encoded. One `fill` plus one pass of `batches` is a round: a round depends on
    nothing but its own seed, therefore a checkpoint between rounds needs none of the buffer's content.
    """

    def __init__(self, n_layers: int, d_model: int, *, batch: int, max_bytes: int):
        per_frame = n_layers * d_model * 4
        n_batches = max_bytes // (per_frame * batch)
        if n_batches < 1:
            raise UsageError(
                f"a buffer of {max_bytes / 2**20:.0f} MiB cannot hold one batch of {batch} frames x "
                f"{n_layers} layers x {d_model}: give {per_frame * batch / 2**20:.0f} MiB or a smaller batch"
            )
        self.batch = batch
        self.capacity = n_batches * batch
        self.data = torch.empty(n_layers, self.capacity, d_model)

    @property
    def nbytes(self) -> int:
        return self.data.numel() * 4

    @property
    def batches_per_round(self) -> int:
        return self.capacity // self.batch

    def fill(
        self, windows: Iterator[tuple[Tensor, int]], *, on_frames: Callable[[int], None] | None = None
    ) -> None:
        """Fill to capacity with the true frames of (activations (layers, 1500, d_model), true frames) pairs.

        Raises:
            UsageError: the windows ended before the buffer was full.
        """
        filled = 0
        for activations, n_true in windows:
            take = min(n_true, self.capacity - filled)
            self.data[:, filled : filled + take] = activations[:, :take]
            filled += take
            if on_frames is not None:
                on_frames(take)
            if filled == self.capacity:
                return
        raise UsageError(f"the audio ended after {filled} frames, the buffer needs {self.capacity}")

    def batches(self, seed: Sequence[int]) -> Iterator[Tensor]:
        """Every frame once, in an order given by `seed`: tensors (layers, batch, d_model)."""
        order = torch.from_numpy(np.random.default_rng(list(seed)).permutation(self.capacity))
        for start in range(0, self.capacity, self.batch):
            yield self.data[:, order[start : start + self.batch]]
