"""Saves and loads inference SAEs and training checkpoints of SAELens, applies them; applies what we wrote."""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import D, K, N, Results, randomise

sys.path.pop(0)  # this folder holds a file of the library's name

import sae_lens  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening  # noqa: E402

results = Results(sys.argv[1])


def new(kind: str, seed: int, **options: Any) -> Any:
    metadata = SAEMetadata(model_name="whisper-small", hook_name=f"blocks.{seed}.hook_resid_post")
    config = getattr(sae_lens, f"{kind}Config")(d_in=D, d_sae=N, metadata=metadata, **options)
    sae = getattr(sae_lens, kind)(config)
    randomise(sae, seed)
    if hasattr(sae, "threshold"):
        sae.threshold.data.abs_()
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(2.0)
    return sae


@torch.no_grad()
def apply(name: str, sae: Any, into: Any = lambda x: x, back: Any = lambda x: x) -> None:
    codes = sae.encode(into(results.x))
    results.add(name, codes, back(sae.decode(codes)))


INFERENCE = {
    "standard": ("StandardSAE", {}),
    "standard_plain_input": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "topk": ("TopKSAE", {"k": K}),
    "topk_rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "gated_plain_input": ("GatedSAE", {"apply_b_dec_to_input": False}),
}
for seed, (name, (kind, options)) in enumerate(INFERENCE.items()):
    new(kind, seed, **options).save_model(results.made(name))
    apply(name, SAE.load_from_disk(results.folder / "made" / name))

# trained as BatchTopK, saved by SAELens as jumprelu
trained = new("BatchTopKTrainingSAE", 7, k=K)
trained.save_inference_model(results.made("batchtopk_inference"))
inference = SAE.load_from_disk(results.folder / "made" / "batchtopk_inference")
apply("batchtopk_inference", inference)

# checkpoints: the training class's own files, inputs normalised outside of it
trained.save_model(results.made("batchtopk_checkpoint"))
apply("batchtopk_checkpoint", inference)

for name, mode in (("scaled", "expected_average_only_in"), ("whitened", "covariance_whitening")):
    trained = new("BatchTopKTrainingSAE", 8, k=K, normalize_activations=mode)
    folder = results.made(f"{name}_checkpoint")
    trained.save_model(folder)
    scaler = ActivationScaler()
    if name == "scaled":
        scaler.scaling_factor = 0.7
    else:
        scaler.estimate_whitening(D, iter([results.x[:100], results.x[100:]]), 2)
        assert isinstance(scaler.whitening, ActivationWhitening)
    scaler.save(str(folder / "activation_scaler.json"))
    trained.save_inference_model(results.folder / name)
    apply(f"{name}_checkpoint", SAE.load_from_disk(results.folder / name), scaler.scale, scaler.unscale)

for folder in results.exported():
    apply(folder.name, SAE.load_from_disk(folder))
results.save()
