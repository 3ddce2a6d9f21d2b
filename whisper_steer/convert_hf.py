"""Whisper weights in transformers' naming, as openai-whisper models.

A transformers folder holds config.json and model.safetensors (one file, or shards listed in
model.safetensors.index.json), older ones pytorch_model.bin. The weights are the same numbers under other
names, so the converted model computes the same thing; naming follows transformers' own
convert_openai_to_hf.py, read backwards.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from .errors import FormatError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference
INDEX_SUFFIX = ".index.json"

MODULES = {  # inside one block: transformers -> openai
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn.q_proj": "cross_attn.query",
    "encoder_attn.k_proj": "cross_attn.key",
    "encoder_attn.v_proj": "cross_attn.value",
    "encoder_attn.out_proj": "cross_attn.out",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
OUTSIDE_BLOCKS = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "encoder.layer_norm.weight": "encoder.ln_post.weight",
    "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.embed_tokens.weight": "decoder.token_embedding.weight",
    "decoder.layer_norm.weight": "decoder.ln.weight",
    "decoder.layer_norm.bias": "decoder.ln.bias",
}
DIMS = {  # ModelDimensions field: key in config.json
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def is_transformers_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def openai_name(name: str) -> str | None:
    """'model.encoder.layers.3.fc1.weight' -> 'encoder.blocks.3.mlp.0.weight'; None if openai-whisper has no
    such tensor.

    proj_out (the output projection) is one: openai-whisper uses the token embedding itself.
    """
    name = name.removeprefix("model.")
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    part, _, rest = name.partition(".")
    if part not in ("encoder", "decoder"):
        return None
    if rest.startswith("conv"):
        return name
    if not rest.startswith("layers."):
        return None
    number, _, inside = rest.removeprefix("layers.").partition(".")
    module, _, kind = inside.rpartition(".")
    if not number.isdigit() or module not in MODULES:
        return None
    return f"{part}.blocks.{number}.{MODULES[module]}.{kind}"


def to_openai(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict under openai-whisper's names; tensors unchanged.

    Raises FormatError naming every tensor that has no counterpart, and an output projection that is not tied
    to the token embedding, which openai-whisper cannot express.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in weights.items():
        target = openai_name(name)
        if target is not None:
            renamed[target] = tensor
        elif name != "proj_out.weight":
            unknown.append(name)
    if unknown:
        raise FormatError(f"{len(unknown)} tensors are not Whisper's: {', '.join(sorted(unknown)[:5])}")
    head, embedding = weights.get("proj_out.weight"), renamed.get("decoder.token_embedding.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise FormatError("proj_out.weight differs from the token embedding; openai-whisper ties the two")
    return renamed


def load_transformers(folder: str | Path) -> Whisper:
    """The Whisper in a transformers folder, float32, on the CPU, in evaluation mode.

    The cross-attention heads for word timestamps are taken from generation_config.json where it lists them.
    Raises FormatError: unreadable or foreign config, missing or damaged weights, tensors that do not fit the
    config.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "whisper":
        raise FormatError(
            f"{folder}: config.json is of a {config.get('model_type')!r} model, expected 'whisper'"
        )
    absent = sorted({key for key in DIMS.values() if not isinstance(config.get(key), int)})
    if absent:
        raise FormatError(f"{folder}: config.json lacks {', '.join(absent)}")
    dims = ModelDimensions(**{field: config[key] for field, key in DIMS.items()})
    try:
        weights = to_openai(_read_weights(folder))
    except FormatError as error:
        raise FormatError(f"{folder}: {error}") from error
    model = build_model(dims, weights, str(folder))
    generation = folder / GENERATION_CONFIG
    heads = read_json(generation).get("alignment_heads") if generation.is_file() else None
    set_heads(model, heads, generation)
    return model


def build_model(dims: ModelDimensions, weights: Mapping[str, Tensor], source: str) -> Whisper:
    """A Whisper with these weights; every missing, unexpected and wrongly shaped tensor is named in one
    FormatError."""
    model = Whisper(dims)
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in wanted]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FormatError(f"{source}: weights and dimensions do not fit: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(dict(weights))
    return model.eval()


def set_heads(model: Whisper, heads: Any, source: Path) -> None:
    """Make `heads`, a list of (layer, head), those for word timestamps; None or none: leave openai-whisper's
    choice, the upper half of the decoder. Raises FormatError, naming `source`, if they do not fit."""
    if not heads:
        return
    mask = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    try:
        for layer, head in heads:
            mask[layer, head] = True
    except (IndexError, TypeError, ValueError) as error:
        raise FormatError(f"{source}: alignment_heads do not fit the model ({error})") from error
    model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises FormatError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


def weight_sets(folder: Path) -> list[list[str]]:
    """Names of the files of every set of weights in the folder, each a whole model: first the one that is
    loaded. Raises FormatError: there is none, or the first one's index is damaged."""
    sets: list[list[str]] = []
    for name in WEIGHTS:
        if (folder / name).is_file():
            sets.append([name])
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            try:
                sets.append(shard_names(index))
            except FormatError:
                if not sets:
                    raise
    if not sets:
        raise FormatError(f"no weights; expected {' or '.join(WEIGHTS)}, whole or sharded")
    return sets


def _read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in weight_sets(folder)[0]:
        weights.update(_read_tensors(folder / name))
    return weights


def shard_names(index: Path) -> list[str]:
    """Names of the files that an index lists; a name that leaves the folder is refused."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise FormatError(f"{index}: no weight_map in it")
    names = sorted({str(name) for name in mapping.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise FormatError(f"{index}: {outside[0]!r} is not a plain file name")
    return names


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one weight file."""
    if not path.is_file():
        raise FormatError(f"{path.name} is listed but missing")
    if path.suffix != ".safetensors":
        loaded = read_pickle(path)
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise FormatError(f"{path.name} holds something else than named tensors")
        return loaded
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} is damaged or not safetensors ({_first_line(error)})") from error


def read_pickle(path: Path) -> Any:
    """A torch checkpoint on the CPU; weights_only=True: plain containers and tensors, no code is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise FormatError(f"{path} is damaged or not a torch checkpoint ({load_failure(error)})") from error


def load_failure(error: Exception) -> str:
    """Why torch.load failed, in a few words; never torch's advice to run the code in the file."""
    if not isinstance(error, pickle.UnpicklingError):
        return _first_line(error)
    found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
    return f"it holds a {found[1]}, not tensors alone" if found else "it does not hold tensors"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
