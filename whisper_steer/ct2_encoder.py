"""Whisper's encoder in PyTorch, filled from a CTranslate2 model.bin of any quantisation.

CTranslate2 runs whole encoders only; an edit that depends on the frame needs to come between two blocks. The
weights are those of the very file that CTranslate2 loaded, so nothing else is downloaded; integers are
divided by their scales (ct2_file.py). Its names: python/ctranslate2/specs/whisper_spec.py and
transformer_spec.py of CTranslate2 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from whisper.model import AudioEncoder

from .ct2_file import read_layout, read_variables
from .errors import FormatError

_PREFIX = "encoder/"
# openai-whisper's name of a block's part: CTranslate2's
_BLOCK_PARTS = {
    "attn_ln": "self_attention/layer_norm",
    "attn.out": "self_attention/linear_1",
    "mlp_ln": "ffn/layer_norm",
    "mlp.0": "ffn/linear_0",
    "mlp.2": "ffn/linear_1",
}
_NORMS = ("attn_ln", "mlp_ln", "ln_post")
_EXACT_TYPES = ("float32", "float16")
# what converters put around the name of the model that they converted
_DECORATION = re.compile(
    r"^(faster-|ct2-|whisper-)+|([-_.](ct2|ctranslate2|float32|float16|bfloat16|int16|int8))+$"
)
# folders that are named after what they hold, not after the model: "ct2-int8", "ctranslate2"
_NAMELESS = re.compile(r"(faster|whisper|model|ct2|ctranslate2|b?float16|float32|int16|int8|[-_.])+")

AfterBlock = Callable[[int, Tensor], Tensor]
"""Called with (layer, output of encoder.blocks[layer] (batch, frames, d_model)); returns what goes on."""


def load_encoder(source: str | Path | bytes) -> AudioEncoder:
    """openai-whisper's AudioEncoder with the weights of a model.bin (path, its folder, or the file's bytes).

    float32, on the CPU, in evaluation mode, without gradients. Raises FormatError: unreadable, or not
    Whisper's encoder.
    """
    found = read_variables(source, _PREFIX)
    try:
        return _build({name.removeprefix(_PREFIX): values for name, values in found.items()})
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FormatError(
            f"{_described(source)} does not hold Whisper's encoder as CTranslate2 4 writes it ({reason}): "
            "convert the model again"
        ) from error


def run_encoder(encoder: AudioEncoder, mel: Tensor, after_block: AfterBlock | None = None) -> Tensor:
    """mel (batch, n_mels, 2 n) -> (batch, n, d_model), n at most 1500: 20 ms per frame.

    As CTranslate2, unlike openai-whisper, a window may be shorter than 30 s. mel has the encoder's device and
    dtype. Without gradients.
    """
    with torch.no_grad():
        x = F.gelu(encoder.conv1(mel))
        x = F.gelu(encoder.conv2(x)).permute(0, 2, 1)
        x = (x + encoder.positional_embedding[: x.shape[1]]).to(x.dtype)
        for layer, block in enumerate(encoder.blocks):
            x = block(x)
            if after_block is not None:
                x = after_block(layer, x)
        return encoder.ln_post(x)


class Ct2View:
    """What Steering.check and the zoo look at in an openai-whisper model, read from a CTranslate2 file.

    name: that of the model, without what converters add to it ("faster-whisper-small.en-int8" -> "small.en").
    """

    def __init__(self, source: str | Path | bytes, name: str) -> None:
        layout = read_layout(source)
        shape = layout.variable(f"{_PREFIX}position_encodings/encodings").shape
        layers = _count_layers(layout.names)
        self.dims = SimpleNamespace(n_audio_state=shape[1], n_audio_layer=layers, n_audio_ctx=shape[0])
        self.name = plain_name(name)
        types = {v.dtype for v in layout.variables.values() if v.name.startswith(_PREFIX) and v.shape}
        self.exact = types == {"float32"}
        self.comparable = types <= set(_EXACT_TYPES)
        """Are the weights as they were converted (float32), or at most rounded to float16, as OpenAI
        published them? Else their hash says nothing."""
        self._source = source

    @cached_property
    def encoder(self) -> AudioEncoder:
        return load_encoder(self._source)


def plain_name(name: str | Path) -> str:
    """The name that a steering is kept under, from a folder, a hub id or a file of the hub's cache. A folder
    that says only what it holds ("ct2-int8") is named by the record of what was baked into it, or by the
    folder around it if that is called like a model, else as it is."""
    parts = str(name).replace("\\", "/").rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    if not _NAMELESS.fullmatch(parts[-1]):
        return _DECORATION.sub("", parts[-1]) or parts[-1]
    folder = Path(name)
    if not folder.is_dir():
        return parts[-1]
    from .bake_record import read_records
    from .zoo import is_known_name

    recorded = [record.get("base_model") for record in read_records(folder)]
    around = _DECORATION.sub("", folder.resolve().parent.name)
    return str(next(filter(None, recorded), None) or (around if is_known_name(around) else parts[-1]))


def _build(found: dict[str, np.ndarray]) -> AudioEncoder:
    n_mels = found["conv1/weight"].shape[1]
    n_ctx, d_model = found["position_encodings/encodings"].shape
    n_layers = _count_layers(found)
    encoder = AudioEncoder(n_mels, n_ctx, d_model, int(found["num_heads"]), n_layers)
    state = {"positional_embedding": found["position_encodings/encodings"]}
    for name in ("conv1", "conv2"):
        state |= _pair(found, name, name)
    state |= _pair(found, "ln_post", "layer_norm")
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}.", f"layer_{layer}/"
        for part, name in _BLOCK_PARTS.items():
            state |= _pair(found, ours + part, theirs + name)
        fused = theirs + "self_attention/linear_0/"
        weights, biases = np.split(found[fused + "weight"], 3), np.split(found[fused + "bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            state[f"{ours}attn.{part}.weight"] = weight
            if part != "key":  # Whisper's keys have no bias: zeros here
                state[f"{ours}attn.{part}.bias"] = bias
    encoder.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in state.items()})
    return encoder.eval().requires_grad_(False)


def _pair(found: dict[str, np.ndarray], ours: str, theirs: str) -> dict[str, np.ndarray]:
    norm = ours.rpartition(".")[2] in _NORMS
    weight, bias = ("gamma", "beta") if norm else ("weight", "bias")
    return {f"{ours}.weight": found[f"{theirs}/{weight}"], f"{ours}.bias": found[f"{theirs}/{bias}"]}


def _count_layers(names: Any) -> int:
    layers = {int(match[1]) for name in names if (match := re.match(r"(?:encoder/)?layer_(\d+)/", name))}
    return len(layers)


def _described(source: str | Path | bytes) -> str:
    return "model.bin in memory" if isinstance(source, bytes) else str(source)
