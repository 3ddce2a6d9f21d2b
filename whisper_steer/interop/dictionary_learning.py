"""dictionary_learning's files, and AudioSAE's, which use them: `ae.pt` and `config.json` in one folder.

Classes and keys as in dictionary_learning 0.1.0. All but JumpReluAutoEncoder and AutoEncoderNew encode
x - b_dec, which is folded into b_enc here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert_hf import read_pickle
from ..errors import FormatError
from ..sae import SparseAutoencoder
from .parts import Parts, checked_parts, chosen_layer, read_json, required, source, whole_k

logger = logging.getLogger("whisper_steer")

LIBRARY = "dictionary_learning"
WEIGHTS = "ae.pt"
CONFIG = "config.json"
THRESHOLD_MISSING = "theta_missing"

_AUDIOSAE_FOLDER = re.compile(r"layer_(\d+)")
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
# their class -> our activation
_CLASSES = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "jumprelu",
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
}


def load_dictionary_learning(path: str | Path, layer: int | None = None) -> SparseAutoencoder:
    """Read `ae.pt` (weights_only: no code in the pickle is run) and the config.json beside it.

    path: the folder or the .pt file. layer: 0-based, overrides what the files say: the folder's name (see
    `recorded_layer`), else config.json's trainer.layer.

    A BatchTopK without a threshold of its own (missing, or dictionary_learning's -1 for "never estimated")
    gets theta 0 and metadata "theta_missing": True, with a warning: far more than k latents are active until
    it is calibrated. Raises FormatError, UsageError (layer unknown).
    """
    folder, weights = _files(Path(path))
    config = read_config(folder)
    tensors = read_pickle(weights)
    if not isinstance(tensors, Mapping):
        raise FormatError(f"{weights} holds a {type(tensors).__name__}: expected a dictionary of tensors")
    kind = _class_of(config, tensors, weights)
    activation = _CLASSES[kind]
    chosen = chosen_layer(layer, recorded_layer(folder, config), weights)
    k = _k(config, tensors, weights) if activation in ("topk", "batchtopk") else None
    metadata = source(LIBRARY, kind, weights, config.get("lm_name"))
    if config.get("submodule_name"):
        metadata["source"]["submodule"] = config["submodule_name"]
    if isinstance(tensors.get("group_sizes"), Tensor):
        metadata["group_sizes"] = tensors["group_sizes"].tolist()
    theta = _theta(tensors, weights) if activation == "batchtopk" else None
    if activation == "batchtopk" and theta is None:
        metadata[THRESHOLD_MISSING] = True
        logger.warning(
            "%s has no threshold: theta is set to 0, so that far more than k = %d latents are active; "
            "set it on audio with: whisper-steer saes import --model NAME --audio PATH",
            weights,
            k,
        )
    parts = _parts(kind, tensors, theta, weights)
    return parts.build(activation=activation, k=k, layer=chosen, metadata=metadata)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json's "trainer" table (or the whole, if it is flat); empty without the file."""
    if not (folder / CONFIG).is_file():
        return {}
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer", config)
    return trainer if isinstance(trainer, dict) else config


def recorded_layer(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The 0-based layer by the folder's name, else by config.json.

    AudioSAE's folders layer_1 .. layer_12 count from 1 (unless a layer_0 stands beside them);
    dictionary_learning's own trainer.layer counts from 0.
    """
    for place in (folder.resolve(), folder):
        layer = layer_of_folder(place.name, counts_from_0=(place.parent / "layer_0").is_dir())
        if layer is not None:
            return layer
    layer = config.get("layer")
    return layer if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 else None


def layer_of_folder(name: str, *, counts_from_0: bool) -> int | None:
    """0-based layer of AudioSAE's folder "layer_N", None for another name.

    counts_from_0: whether there is a layer_0 beside it, which AudioSAE, counting from 1, does not have.
    """
    match = _AUDIOSAE_FOLDER.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    return number if counts_from_0 or number == 0 else number - 1


def _files(path: Path) -> tuple[Path, Path]:
    """(folder, weights file)."""
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise FormatError(f"{path} does not exist: expected dictionary_learning's {WEIGHTS}")
    return path.parent, path


def _class_of(config: Mapping[str, Any], tensors: Mapping[str, Any], where: Path) -> str:
    kind = config.get("dict_class")
    if kind in _CLASSES:
        return str(kind)
    if kind is not None:
        raise FormatError(f"{where}: dict_class is {kind!r}, expected one of {', '.join(_CLASSES)}")
    if "r_mag" in tensors:
        return "GatedAutoEncoder"
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in tensors and "threshold" in tensors:
        return "JumpReluAutoEncoder"
    if "decoder.bias" in tensors:
        return "AutoEncoderNew"
    if "bias" in tensors:
        return "AutoEncoder"
    raise FormatError(
        f"{where} alone does not tell BatchTopK from TopK: put config.json beside it, at least "
        '{"trainer": {"dict_class": "BatchTopKSAE", "k": 50}}'
    )


def _parts(kind: str, tensors: Mapping[str, Any], theta: Tensor | None, where: Path) -> Parts:
    if kind == "AutoEncoder":
        W_enc, b_enc, W_dec, b_dec = required(tensors, (*_LINEAR, "bias"), where)
        parts = checked_parts(where, W_enc, b_enc, W_dec.T, b_dec)
        # unit rows: their loader does it too, and the codes depend on it
        return parts.encoding_minus_b_dec().with_unit_decoder(scale_theta=True)
    if kind == "AutoEncoderNew":
        W_enc, b_enc, W_dec, b_dec = required(tensors, (*_LINEAR, "decoder.bias"), where)
        return checked_parts(where, W_enc, b_enc, W_dec.T, b_dec)
    if kind == "GatedAutoEncoder":
        names = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
        W_enc, W_dec, b_dec, r_mag, b_gate, b_mag = required(tensors, names, where)
        checked_parts(where, W_enc, b_gate, W_dec.T, b_dec, theta=r_mag)
        parts = checked_parts(where, W_enc, b_mag, W_dec.T, b_dec)
        return parts.gated(r_mag, b_gate, b_mag).encoding_minus_b_dec()
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        W_enc, b_enc, W_dec, b_dec = required(tensors, ("W_enc", "b_enc", "W_dec", "b_dec"), where)
        if kind == "JumpReluAutoEncoder":
            (theta,) = required(tensors, ("threshold",), where)
            return checked_parts(where, W_enc.T, b_enc, W_dec, b_dec, theta=theta)
        return checked_parts(where, W_enc.T, b_enc, W_dec, b_dec, theta=theta).encoding_minus_b_dec()
    W_enc, b_enc, W_dec, b_dec = required(tensors, (*_LINEAR, "b_dec"), where)
    return checked_parts(where, W_enc, b_enc, W_dec.T, b_dec, theta=theta).encoding_minus_b_dec()


def _theta(tensors: Mapping[str, Any], where: Path) -> Tensor | None:
    """The threshold, None if it was never estimated."""
    theta = tensors.get("threshold")
    if theta is None:
        return None
    theta = torch.as_tensor(theta).double()
    if not bool(torch.isfinite(theta).all()):
        raise FormatError(f"{where}: threshold holds NaN or infinity")
    return None if bool((theta < 0).any()) else theta


def _k(config: Mapping[str, Any], tensors: Mapping[str, Any], where: Path) -> int:
    ks = [whole_k(table["k"], where) for table in (config, tensors) if table.get("k") is not None]
    if not ks:
        raise FormatError(f"{where}: k is neither in it nor in {CONFIG}")
    if len(set(ks)) > 1:
        raise FormatError(f"{where}: {CONFIG} says k = {ks[0]}, the weights say k = {ks[1]}")
    return ks[0]
