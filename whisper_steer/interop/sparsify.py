"""sparsify's (eai-sparsify) files: `<hookpoint>/sae.safetensors` and `cfg.json`. Read in sparsify 1.3.3.

It encodes x - b_dec and keeps the k largest ReLU pre-activations of each frame.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, UsageError
from ..fileformat import save_tensors
from ..sae import SparseAutoencoder
from .parts import (
    checked_parts,
    chosen_layer,
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

logger = logging.getLogger("whisper_steer")

LIBRARY = "sparsify"
WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"


def load_sparsify(folder: str | Path, layer: int | None = None) -> SparseAutoencoder:
    """Read one hookpoint's folder as a "topk" SAE; its subtraction of b_dec is folded into b_enc.

    layer: 0-based, overrides the one in the folder's name (sparsify's hookpoint, such as "layers.3" or
    "encoder.layers.3"). Refused by name: groupmax, transcoders, skip connections, a file without decoder.
    Raises FormatError, UsageError (layer unknown).
    """
    folder = Path(folder)
    weights, config_path = folder / WEIGHTS, folder / CONFIG
    config = read_json(config_path)
    tensors, header = read_safetensors(weights)
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise FormatError(f"{config_path}: activation {activation!r} cannot be loaded, expected 'topk'")
    for option, what in (
        ("transcode", "a transcoder"),
        ("skip_connection", "an SAE with a skip connection"),
        ("signed", "an SAE with signed codes"),
    ):
        if config.get(option):
            raise FormatError(f"{config_path}: {what} cannot be loaded, expected {option} false")
    W_enc, b_enc, W_dec, b_dec = required(
        tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), weights
    )
    parts = checked_parts(weights, W_enc, b_enc, W_dec, b_dec).encoding_minus_b_dec()
    name = folder.resolve().name
    chosen = chosen_layer(
        layer, recorded_layer(folder), folder, f" (the folder's name {name!r} is not a block's)"
    )
    metadata = source(LIBRARY, "SparseCoder", weights, None)
    metadata["source"]["hook"] = name
    metadata.update(own_metadata(header))
    k = whole_k(config.get("k"), config_path)
    return parts.build(activation="topk", k=k, layer=chosen, metadata=metadata)


def save_sparsify(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Write `sae.safetensors` and `cfg.json`, which SparseCoder.load_from_disk reads; each atomically.

    A "topk" SAE goes out exactly. A "batchtopk" keeps its k but loses its thresholds, for sparsify knows only
    the k largest of each frame: codes then differ, and a warning says so. sparsify takes the layer from the
    folder's name: call it "encoder.layers.N".

    Raises UsageError for an SAE without k, FormatError where the folder cannot be written.
    """
    folder = Path(folder)
    if sae.k is None:
        raise UsageError(
            f"a {sae.activation!r} SAE has no k and sparsify knows only TopK: export it with save_saelens"
        )
    if sae.activation != "topk":
        logger.warning(
            "%s: sparsify keeps the %d largest latents of every frame, which is not this SAE's threshold: "
            "codes will differ; SAELens' format is exact",
            folder,
            sae.k,
        )
    W_enc, b_enc, b_dec = (tensor.detach().double() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec))
    lengths = sae.W_dec.detach().norm(dim=1)
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": b_enc + W_enc @ b_dec,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    config: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(sae.n_latents // sae.d_model, 1),
        "normalize_decoder": bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3)),
        "num_latents": sae.n_latents,
        "k": min(sae.k, sae.n_latents),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
    }
    floats = {name: tensor.detach().float() for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, floats, provenance(sae, LIBRARY))
    write_json(folder / CONFIG, config)


def recorded_layer(folder: Path) -> int | None:
    """The 0-based layer by the folder's name."""
    return layer_of_hook(folder.resolve().name)
