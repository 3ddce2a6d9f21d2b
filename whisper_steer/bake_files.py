"""Which bytes of a model's files change when vectors are added to its encoder blocks' outputs, per format.

A vector added to the output of an encoder block is the same as that vector added to the bias of the block's
second MLP layer, for blocks are pre-norm and residual:

    openai        encoder.blocks.N.mlp.2.bias               .pt (a zip of raw tensors)
    transformers  model.encoder.layers.N.fc2.bias           safetensors (also sharded), pytorch_model.bin
    ct2           encoder/layer_N/ffn/linear_1/bias         model.bin of any quantisation
    ggml          encoder.blocks.N.mlp.2.bias               f32 in files of any quantisation
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from . import ct2_file, ggml_file
from .bake_zip import zip_splices, zip_tensors
from .convert_hf import read_json, weight_sets
from .errors import FormatError, UsageError
from .floats import added
from .splices import Splice

if TYPE_CHECKING:
    from torch import Tensor

Additions = Mapping[int, np.ndarray]  # layer (0-based) -> (d_model,) float32

SAFETENSORS_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# what programs call files with the weights of a model, or a part of them
_WEIGHTS = re.compile(
    r"((pytorch|tf|flax|rust|encoder|decoder)_)?(with_past_)?model.*"
    r"\.(safetensors|bin|h5|msgpack|onnx|onnx_data|ot|ckpt)"
)


@dataclass(frozen=True)
class Shape:
    """Width and number of blocks of a model's encoder."""

    d_model: int
    n_layers: int


def format_of(path: Path) -> str | None:
    """The format of an existing file or folder, None if it is none of the four."""
    if path.is_dir():
        if (path / ct2_file.MODEL_FILE).is_file():
            return "ct2"
        return "transformers" if (path / "config.json").is_file() else None
    if ggml_file.is_ggml(path):
        return "ggml"
    return "openai" if path.suffix in (".pt", ".pth") else None


def shape_of(path: Path, format: str) -> Shape:
    """Width and depth of the encoder. Raises FormatError."""
    if format == "ct2":
        layout = ct2_file.read_layout(path)
        biases = [name for name in layout.names if re.fullmatch(r"encoder/layer_\d+/ffn/linear_1/bias", name)]
        return Shape(layout.variable(ct2_file.ffn_bias_name(0)).shape[0], len(biases))
    if format == "ggml":
        hparams = ggml_file.read_layout(path).hparams
        return Shape(hparams["n_audio_state"], hparams["n_audio_layer"])
    if format == "transformers":
        config = read_json(path / "config.json")
        try:
            return Shape(int(config["d_model"]), int(config["encoder_layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: config.json is not a Whisper's (no d_model, encoder_layers)"
            ) from error
    tensors = openai_tensors(path)
    count = sum(name.startswith("encoder.blocks.") and name.endswith(".mlp.2.bias") for name in tensors)
    return Shape(tensors[ggml_file.mlp_bias_name(0)].shape[0], count)


def splices_of(path: Path, format: str, additions: Additions) -> dict[str, list[Splice]]:
    """Splices by file name (relative to a folder; a file's own name).

    Raises FormatError (unreadable, or without these tensors), UsageError (shapes or range do not fit).
    """
    if format == "openai":
        return {
            path.name: zip_splices(path, openai_tensors(path), _named(additions, ggml_file.mlp_bias_name))
        }
    if format == "ggml":
        with open(path, "rb") as file:
            named = _named(additions, ggml_file.mlp_bias_name)
            return {path.name: ggml_file.addition_splices(file, named, str(path))}
    if format == "ct2":
        named = _named(additions, ct2_file.ffn_bias_name)
        with open(path / ct2_file.MODEL_FILE, "rb") as file:
            return {ct2_file.MODEL_FILE: ct2_file.addition_splices(file, named, str(path))}
    return _transformers_splices(path, additions)


def _named(additions: Additions, name: Any) -> dict[str, np.ndarray]:
    return {name(layer): vector for layer, vector in additions.items()}


# ---------- transformers


def fc2_bias_name(layer: int) -> str:
    """transformers' name of the bias of the second MLP layer of encoder block `layer` (0-based)."""
    return f"model.encoder.layers.{layer}.fc2.bias"


def _transformers_splices(folder: Path, additions: Additions) -> dict[str, list[Splice]]:
    """Of every set of weights in the folder; one that is not loaded may be unreadable: see `left_out`."""
    first, *others = weight_sets(folder)
    found = _shard_splices(folder, first, additions)
    for shards in others:
        try:
            found |= _shard_splices(folder, shards, additions)
        except FormatError:
            continue
    return found


def left_out(folder: Path, format: str, patched: Iterable[str]) -> list[str]:
    """Weights in the folder (relative names) that are no part of a set with `patched` files: they would stay
    those of the model as it was."""
    kept = set(patched)
    for shards in weight_sets(folder) if format == "transformers" else ():
        kept.update(shards if kept & set(shards) else ())
    found = [file for place in (folder, folder / "onnx") if place.is_dir() for file in place.iterdir()]
    names = {str(file.relative_to(folder)) for file in found if _WEIGHTS.fullmatch(file.name)}
    return sorted(names - kept)


def _shard_splices(folder: Path, shards: list[str], additions: Additions) -> dict[str, list[Splice]]:
    found: dict[str, list[Splice]] = {}
    missing = set(additions)
    for shard in shards:
        path = folder / shard
        safe = path.suffix == ".safetensors"
        header = safetensors_header(path) if safe else zip_tensors(path)
        here = {}
        for layer in sorted(missing):
            full = fc2_bias_name(layer)
            name = full if full in header else full.removeprefix("model.")  # some leave the prefix out
            if name in header:
                here[name] = additions[layer]
                missing.discard(layer)
        if here:
            found[shard] = _safetensors_splices(path, here) if safe else zip_splices(path, header, here)
    if missing:
        raise FormatError(f"{folder} has no tensor {fc2_bias_name(min(missing))}")
    return found


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header's tensors by name, with "" -> where the data begin. Raises FormatError: damaged."""
    try:
        with safe_open(path, framework="np"):  # checks the header, and the offsets against the file
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {**header, "": 8 + length}
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FormatError(f"{path} is damaged or not safetensors ({reason})") from error


def _safetensors_splices(path: Path, additions: Mapping[str, np.ndarray]) -> list[Splice]:
    header = safetensors_header(path)
    splices = []
    with open(path, "rb") as file:
        for name, vector in additions.items():
            entry = header[name]
            begin, end = entry["data_offsets"]
            file.seek(header[""] + begin)
            old = file.read(end - begin)
            dtype = SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"])
            new = added(old, dtype, tuple(entry["shape"]), vector, name)
            splices.append(Splice(header[""] + begin, old, new))
    return splices


# ---------- openai-whisper


def openai_tensors(path: Path) -> dict[str, Tensor]:
    """The state of a .pt checkpoint, mapped into memory. Raises FormatError."""
    tensors = zip_tensors(path, "model_state_dict")
    if ggml_file.mlp_bias_name(0) not in tensors:
        raise FormatError(
            f"{path} is not an openai-whisper checkpoint: it has no {ggml_file.mlp_bias_name(0)}"
        )
    return tensors


def fitting(path: Path, format: str, d_model: int, layers: tuple[int, ...], name: str) -> None:
    """Raises UsageError unless the model's encoder has this width and these blocks."""
    shape = shape_of(path, format)
    if shape.d_model != d_model or max(layers) >= shape.n_layers:
        raise UsageError(
            f"{name} is for a d_model of {d_model} and at least {max(layers) + 1} blocks, {path} has "
            f"{shape.d_model} and {shape.n_layers}: pass --steering made for it"
        )
