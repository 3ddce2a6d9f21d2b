"""SAEs in the true layouts of other libraries, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from whisper_steer.sae import SparseAutoencoder

# three latents on two inputs; encodes x - b_dec, so that x = (2, 3) is (1, 1) for the encoder
W_ENC = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
B_ENC = torch.tensor([0.5, -1.0, 0.0])
W_DEC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
B_DEC = torch.tensor([1.0, 2.0])
X = torch.tensor([[2.0, 3.0], [1.0, 2.0]])
PRE = torch.tensor([[1.5, 1.0, 2.0], [0.5, -1.0, 0.0]])


def write_dictionary_learning(
    folder: Path,
    dict_class: str | None = "BatchTopKSAE",
    *,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "encoder.weight": W_ENC,
        "encoder.bias": B_ENC,
        "decoder.weight": W_DEC.T.contiguous(),
        "b_dec": B_DEC,
        "k": torch.tensor(2, dtype=torch.int),
        "threshold": torch.tensor(0.75),
        **changes,
    }
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "ae.pt")
    if dict_class is not None:
        config = {"trainer": {"dict_class": dict_class, "k": 2, **(trainer or {})}, "buffer": {"ctx_len": 1}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sparsify(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    save_file(weights if tensors is None else tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 32, "k": 2, "num_latents": 3, "d_in": 2, **changes}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_saelens(folder: Path, architecture: str = "jumprelu", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"W_enc": W_ENC.T.contiguous(), "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    if architecture == "jumprelu":
        tensors["threshold"] = torch.tensor([0.75, 1.5, 0.75])
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": 2,
        "d_sae": 3,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.4.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
    return folder


def assert_codes(sae: SparseAutoencoder, codes: list[list[float]]) -> None:
    expected = torch.tensor(codes)
    with torch.no_grad():
        torch.testing.assert_close(sae.pre_activations(X), PRE)
        torch.testing.assert_close(sae.encode(X), expected)
        torch.testing.assert_close(sae(X), expected @ W_DEC + B_DEC)
    assert not sae.training and all(tensor.dtype == torch.float32 for tensor in sae.state_dict().values())
