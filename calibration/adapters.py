"""Audio encoders behind one interface: audio in, every layer's frames out, padding never among them.

`WhisperEncoder` reads openai-whisper models, `TransformersWhisperEncoder` the same weights as a transformers
model, `RawAudioEncoder` transformers' HuBERT, wav2vec 2.0 and WavLM, which hear the samples themselves.
`load_encoder` picks one from a name or a path.

"Layer i" is what block i (0-based) hands to the next one. A layer norm that a model applies after its last
block is not part of any layer.

Shapes: audio (samples,) float32 at 16 kHz, frames (layers, frames, d_model) float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from whisper.audio import N_SAMPLES

from calibration.block_encoder import BlockEncoder, LogMelEncoder, Piece
from calibration.hub_models import RAW_FAMILIES, load_raw_model, model_type
from whisper_steer.convert_hf import openai_name
from whisper_steer.errors import ModelError, UsageError
from whisper_steer.fileformat import model_metadata, model_name
from whisper_steer.zoo import load_model

if TYPE_CHECKING:
    from whisper.model import Whisper


class AudioEncoder(Protocol):
    """What SAE training needs to know of a model.

    Attributes:
        name: the model's name, for files and titles.
        family: "whisper", "hubert", "wav2vec2" or "wavlm".
        n_layers: number of encoder blocks.
        d_model: width of their output.
        frame_samples: samples (16 kHz) from one frame to the next; 320 for the released models.
        max_samples: longest audio that the model sees at once.
        device: where the model is, and where `encode` leaves its result.
    """

    name: str
    family: str
    n_layers: int
    d_model: int
    frame_samples: int
    max_samples: int

    @property
    def device(self) -> torch.device: ...

    def metadata(self) -> dict[str, Any]:
        """base_model, encoder_sha256, d_model, n_layers, family, precision (raw audio models: do_normalize,
        too); JSON-able. Encoders with equal metadata give the same frames, up to a device's rounding."""
        ...

    def encode(self, audios: Sequence[np.ndarray], layers: Sequence[int]) -> list[Tensor]:
        """Frames (len(layers), true frames, d_model) of every audio (samples,), float32, on `device`."""
        ...


class WhisperEncoder(LogMelEncoder):
    """An openai-whisper model; it stays reachable as `.model`.

    Args:
        model: set to evaluation mode.
        autocast: torch.bfloat16 or torch.float16 for the matrix products; None: the weights' own precision.

    Raises:
        UsageError: another autocast dtype, or a model that does not hear 30 s at once.
    """

    def __init__(self, model: Whisper, *, autocast: torch.dtype | None = None):
        dims = model.dims
        super().__init__(
            model,
            model.encoder,
            model.encoder.blocks,
            n_mels=dims.n_mels,
            n_positions=dims.n_audio_ctx,
            autocast=autocast,
        )
        self.model = model
        self.name, self.d_model = model_name(model), dims.n_audio_state

    def _identity(self) -> dict[str, Any]:
        return model_metadata(self.model)


class TransformersWhisperEncoder(LogMelEncoder):
    """A transformers WhisperModel or WhisperForConditionalGeneration.

    The mel is openai-whisper's, so the same weights give the same frames, and the same encoder_sha256, as
    in a `WhisperEncoder`.

    Args:
        model: set to evaluation mode.
        name: of the model; None: the one that transformers loaded it by.
        autocast: see `WhisperEncoder`.

    Raises:
        UsageError: another autocast dtype, another kind of model, or one that does not hear 30 s at once.
    """

    def __init__(self, model: Any, *, name: str | None = None, autocast: torch.dtype | None = None):
        if getattr(getattr(model, "config", None), "model_type", None) != "whisper":
            raise UsageError(
                f"a {type(model).__name__} is not a Whisper: expected transformers' WhisperModel or "
                "WhisperForConditionalGeneration"
            )
        encoder, config = model.get_encoder(), model.config
        super().__init__(
            model,
            encoder,
            encoder.layers,
            n_mels=config.num_mel_bins,
            n_positions=config.max_source_positions,
            autocast=autocast,
        )
        self.name, self.d_model = name or _name_of(model), config.d_model

    def _identity(self) -> dict[str, Any]:
        renamed = {
            str(openai_name(f"encoder.{name}")).removeprefix("encoder."): parameter
            for name, parameter in self._encoder.named_parameters()
            if name != "embed_positions.weight"  # a buffer in openai-whisper
        }
        return _identity(self, renamed)


class RawAudioEncoder(BlockEncoder):
    """transformers' HubertModel, Wav2Vec2Model or WavLMModel (or one of them below a head).

    A HuBERT or wav2vec 2.0 whose feature encoder normalises each frame (feat_extract_norm "layer") takes
    clips of different lengths in one batch, with an attention mask; where it normalises over time ("group")
    padding would leak into the frames, so only clips of equal length share a batch, as in WavLM. Either way
    a clip's frames do not depend on its neighbours.

    Args:
        model: set to evaluation mode.
        do_normalize: scale each clip to zero mean and unit variance first, as the model's
            preprocessor_config.json says.
        name: of the model; None: the one that transformers loaded it by.
        max_samples: longest piece (16 kHz) the model sees at once; attention costs its square.
        autocast: see `WhisperEncoder`.

    Raises:
        UsageError: another autocast dtype, another kind of model, or max_samples too short for one frame.
    """

    def __init__(
        self,
        model: Any,
        *,
        do_normalize: bool,
        name: str | None = None,
        max_samples: int = N_SAMPLES,
        autocast: torch.dtype | None = None,
    ):
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in RAW_FAMILIES:
            raise UsageError(
                f"a {type(model).__name__} does not hear raw audio: expected transformers' HubertModel, "
                "Wav2Vec2Model or WavLMModel"
            )
        base: nn.Module = model.base_model
        super().__init__(base, base.encoder.layers, autocast)  # type: ignore[union-attr, arg-type]
        config = model.config
        self.family, self.name, self.d_model = kind, name or _name_of(model), config.hidden_size
        self.do_normalize = do_normalize
        self.max_samples, self.frame_samples = max_samples, math.prod(config.conv_stride)
        self._convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        # torch deprecates what WavLM does with a mask (a boolean one beside its position bias)
        self._masks = config.feat_extract_norm == "layer" and kind != "wavlm"
        if self.n_frames(max_samples) < 1:
            raise UsageError(f"max_samples {max_samples} is too short for one frame: give 16000 or more")

    def n_frames(self, n_samples: int) -> int:
        """Frames that the feature encoder's unpadded convolutions make of `n_samples`; 0 where a kernel does
        not fit."""
        for kernel, stride in self._convolutions:
            n_samples = (n_samples - kernel) // stride + 1
        return max(n_samples, 0)

    def _cut(self, owner: int, audio: np.ndarray) -> Iterator[Piece]:
        if self.do_normalize and len(audio):
            # as transformers' Wav2Vec2FeatureExtractor
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        for start in range(0, len(audio), self.max_samples):
            inputs = torch.from_numpy(audio[start : start + self.max_samples])
            yield Piece(owner, inputs, self.n_frames(len(inputs)))

    def _batches(self, pieces: list[Piece], size: int) -> Iterator[list[int]]:
        order = sorted(range(len(pieces)), key=lambda index: len(pieces[index].inputs))
        batch: list[int] = []
        for index in order:
            fits = not batch or self._masks or len(pieces[index].inputs) == len(pieces[batch[0]].inputs)
            if not fits or len(batch) == size:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _forward(self, pieces: list[Piece]) -> None:
        lengths = [len(piece.inputs) for piece in pieces]
        padded = torch.zeros(len(pieces), max(lengths))
        for row, piece in zip(padded, pieces, strict=True):
            row[: len(piece.inputs)] = piece.inputs
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(self.device)
        self._network(padded.to(self.device, self._dtype), attention_mask=mask)

    def _identity(self) -> dict[str, Any]:
        used = {
            name: parameter
            for name, parameter in self._network.named_parameters()
            if name.startswith(("feature_extractor.", "feature_projection.", "encoder."))
        }
        return {**_identity(self, used), "do_normalize": self.do_normalize}


def load_encoder(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_samples: int = N_SAMPLES,
) -> AudioEncoder:
    """The encoder of any model that is kept by name, in a file or folder, or on the Hugging Face hub.

    Args:
        name_or_path: what `whisper_steer.load_model` takes; or a transformers folder or hub id of a HuBERT,
            wav2vec 2.0 or WavLM (needs the extra "hf").
        device: None: CUDA if there is one.
        dtype: torch.bfloat16 or torch.float16 for autocast; None or torch.float32 for full precision.
        max_samples: for raw audio models, see `RawAudioEncoder`; a Whisper always sees 30 s.

    Raises:
        ModelError: unknown name, another kind of model, transformers missing, hub not reachable.
        FormatError: damaged or incomplete files.
        UsageError: a device or dtype that cannot be used.
    """
    autocast = None if dtype == torch.float32 else dtype
    kind = model_type(name_or_path)
    if kind is None or kind == "whisper":
        return WhisperEncoder(load_model(name_or_path, device=device), autocast=autocast)
    if kind not in RAW_FAMILIES:
        raise ModelError(
            f"{name_or_path} is a {kind!r} model, which cannot be encoded: expected whisper, "
            f"{', '.join(RAW_FAMILIES)}"
        )
    model, do_normalize = load_raw_model(name_or_path)
    return RawAudioEncoder(
        _on_device(model, device),
        do_normalize=do_normalize,
        name=_short_name(str(name_or_path)),
        max_samples=max_samples,
        autocast=autocast,
    )


def _on_device(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    chosen = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"device {str(chosen)!r} cannot be used here ({reason}): pass cpu, or leave it out"
        ) from error


def _name_of(model: Any) -> str:
    return _short_name(model.name_or_path) or "unnamed"


def _short_name(name: str) -> str:
    """A hub id as it is; of a folder only its own name, so that nothing about this machine is kept."""
    path = Path(name).expanduser()
    return path.resolve().name if name and path.exists() else name


def _identity(encoder: BlockEncoder, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """As `fileformat.model_metadata`, with the same digest over these parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(name.encode() + b"\0")
        values = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).tobytes())
    return {
        "base_model": encoder.name,
        "encoder_sha256": digest.hexdigest(),
        "d_model": encoder.d_model,
        "n_layers": encoder.n_layers,
    }
