"""SAELens' files: `sae_weights.safetensors` and `cfg.json` in one folder. Read in SAELens 6.54.

Inference SAEs (standard, topk, jumprelu, gated) and training checkpoints (also batchtopk and
matryoshka_batchtopk, which SAELens itself turns into jumprelu).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..fileformat import save_tensors
from ..sae import SparseAutoencoder
from .parts import (
    Parts,
    checked_parts,
    chosen_layer,
    hook_of_layer,
    layer_of_hook,
    own_metadata,
    provenance,
    read_json,
    read_safetensors,
    required,
    source,
    whole_k,
    write_json,
)

LIBRARY = "saelens"
WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"

SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
_LAYOUT_VERSION = "6.0.0"  # first release with this cfg.json
_ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
_EXPORTED = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}


def load_saelens(folder: str | Path, layer: int | None = None) -> SparseAutoencoder:
    """Read an SAE that SAELens saved: its codes and reconstructions on raw activations.

    Folded: apply_b_dec_to_input, rescale_acts_by_decoder_norm, and a scaling or whitening of the inputs whose
    numbers lie in the folder. Refused by name: normalisations that depend on the frame (layer_norm,
    constant_norm_rescale), reshaped attention heads, other architectures. A jumprelu that was trained as
    BatchTopK is loaded as "batchtopk" with its k. layer: 0-based, overrides the hook name's.

    Raises FormatError, UsageError (layer unknown).
    """
    folder = Path(folder)
    weights, config_path = folder / WEIGHTS, folder / CONFIG
    config = read_json(config_path)
    tensors, header = read_safetensors(weights)
    architecture = _architecture(config, config_path)
    metadata = source(LIBRARY, architecture, weights, _recorded(config, "model_name"))
    hook = _recorded(config, "hook_name")
    if hook:
        metadata["source"]["hook"] = hook
    unclear = f" (hook {hook!r} is not a block's output)" if hook else ""
    chosen = chosen_layer(layer, recorded_layer(config), folder, unclear)
    activation, k = _activation(config, architecture, config_path)
    metadata.update(own_metadata(header))
    parts = _folded(_parts(config, architecture, tensors, weights), config, folder)
    return parts.build(activation=activation, k=k, layer=chosen, metadata=metadata)


def save_saelens(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Write `sae_weights.safetensors` and `cfg.json`, which SAE.load_from_disk reads; each atomically.

    Exact: codes and reconstructions are the same. BatchTopK goes out as jumprelu with its thresholds, as
    SAELens does itself. Raises FormatError where the folder cannot be written.
    """
    folder = Path(folder)
    architecture = _EXPORTED[sae.activation]
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if architecture == "jumprelu":
        tensors["threshold"] = sae.theta
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_model,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        config.update(k=sae.k, rescale_acts_by_decoder_norm=False)
    config["metadata"] = {
        "sae_lens_version": _LAYOUT_VERSION,
        "sae_lens_training_version": None,
        "model_name": sae.metadata.get("base_model"),
        "hook_name": hook_of_layer(sae.layer),
        "training_architecture": {"relu": "standard"}.get(sae.activation, sae.activation),
        "training_architecture_details": {} if sae.k is None else {"k": sae.k},
    }
    floats = {name: tensor.detach().float() for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, floats, provenance(sae, LIBRARY))
    write_json(folder / CONFIG, config)


def recorded_layer(config: dict[str, Any]) -> int | None:
    """The 0-based layer by the hook's name."""
    hook = _recorded(config, "hook_name") or _recorded(config, "hook_point")
    return layer_of_hook(str(hook)) if hook else None


def _recorded(config: dict[str, Any], name: str) -> Any:
    """From "metadata" (since 6.0), else from the top."""
    return _table(config.get("metadata")).get(name) or config.get(name)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _architecture(config: dict[str, Any], where: Path) -> str:
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))  # before 6.0
    if function == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture not in _ARCHITECTURES:
        raise FormatError(
            f"{where}: architecture {architecture!r} cannot be loaded, expected one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    if function not in ("relu", "topk"):
        raise FormatError(f"{where}: activation function {function!r} cannot be loaded, expected relu")
    if config.get("reshape_activations", "none") != "none":
        raise FormatError(
            f"{where}: reshape_activations is {config['reshape_activations']!r}, an SAE of attention heads; "
            "expected one of a block's output"
        )
    return str(architecture)


def _activation(config: dict[str, Any], architecture: str, where: Path) -> tuple[str, int | None]:
    """(our activation, k)."""
    if architecture == "topk":
        before_6 = _table(config.get("activation_fn_kwargs")).get("k")
        return "topk", whole_k(config.get("k", before_6), where)
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        return "batchtopk", whole_k(config.get("k"), where)
    if architecture == "jumprelu":
        trained = _recorded(config, "training_architecture")
        k = _table(_recorded(config, "training_architecture_details")).get("k")
        if trained in ("batchtopk", "matryoshka_batchtopk") and k is not None:
            return "batchtopk", whole_k(k, where)
    return ("relu" if architecture == "standard" else "jumprelu"), None


def _parts(config: dict[str, Any], architecture: str, tensors: dict[str, Tensor], where: Path) -> Parts:
    """As an SAE on the inputs that SAELens' module gets: b_dec and the decoder's lengths folded."""
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise FormatError(f"{where} has a finetuning scaling_factor, which SAELens 6 has given up too")
    subtracts = bool(config.get("apply_b_dec_to_input", True))
    if architecture == "gated":
        names: tuple[str, ...] = ("W_enc", "W_dec", "b_dec", "r_mag", "b_gate", "b_mag")
        W_enc, W_dec, b_dec, r_mag, b_gate, b_mag = required(tensors, names, where)
        checked_parts(where, W_enc.T, b_gate, W_dec, b_dec, theta=r_mag)
        parts = checked_parts(where, W_enc.T, b_mag, W_dec, b_dec).gated(r_mag, b_gate, b_mag)
        return parts.encoding_minus_b_dec() if subtracts else parts
    W_enc, b_enc, W_dec, b_dec = required(tensors, ("W_enc", "b_enc", "W_dec", "b_dec"), where)
    theta = None
    if architecture == "jumprelu":
        if "log_threshold" in tensors:  # training checkpoints before 6.20
            theta = tensors["log_threshold"].double().exp()
        else:
            (theta,) = required(tensors, ("threshold",), where)
    elif architecture in ("batchtopk", "matryoshka_batchtopk"):
        (theta,) = required(tensors, ("topk_threshold",), where)
    parts = checked_parts(where, W_enc.T, b_enc, W_dec, b_dec, theta=theta)
    if subtracts:
        parts = parts.encoding_minus_b_dec()
    if config.get("rescale_acts_by_decoder_norm", False):
        parts = parts.with_unit_decoder(scale_theta=False)
    return parts


def _folded(parts: Parts, config: dict[str, Any], folder: Path) -> Parts:
    """As an SAE on raw activations."""
    mode = config.get("normalize_activations", "none")
    if isinstance(mode, bool):  # before 6.0
        mode = "expected_average_only_in" if mode else "none"
    if mode in (None, "none"):
        return parts
    eye = torch.eye(parts.W_enc.shape[1], dtype=torch.float64)
    if mode == "expected_average_only_in":
        factor = read_json(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise FormatError(
                f"{folder / CONFIG}: normalize_activations is {mode!r}, but no factor is in {SCALER}: fold "
                "it in SAELens with fold_activation_norm_scaling_factor and save again"
            )
        return parts.of_inputs(torch.zeros(len(eye)), eye * factor, eye / factor)
    if mode == "covariance_whitening" and (folder / WHITENING).is_file():
        tensors, _ = read_safetensors(folder / WHITENING)
        mean, matrix, inverse = required(tensors, ("mean", "matrix", "inverse_matrix"), folder / WHITENING)
        if mean.shape != eye.shape[:1] or not matrix.shape == inverse.shape == eye.shape:
            raise FormatError(
                f"{folder / WHITENING} is of another width: expected {len(eye)} numbers per frame"
            )
        return parts.of_inputs(mean, matrix, inverse)
    raise FormatError(
        f"{folder / CONFIG}: normalize_activations {mode!r} cannot be folded into the weights; expected "
        f"none, expected_average_only_in with {SCALER}, or covariance_whitening with {WHITENING}"
    )
