"""Saves and loads SparseCoders, applies them; applies what was exported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import D, K, N, Results, randomise

sys.path.pop(0)  # this folder holds a file of the library's name

from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

results = Results(sys.argv[1])


def apply(name: str, folder: Path) -> None:
    sae = SparseCoder.load_from_disk(folder)
    with torch.no_grad():
        top = sae.encode(results.x)
        codes = torch.zeros(len(results.x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
        results.add(name, codes, sae.decode(top.top_acts, top.top_indices))
        assert torch.allclose(sae(results.x).sae_out, results.tensors[f"{name}/reconstruction"], atol=1e-6)


sae = SparseCoder(D, SparseCoderConfig(k=K, num_latents=N))
randomise(sae, 0)
sae.save_to_disk(results.made("layers.3"))
apply("layers.3", results.folder / "made" / "layers.3")
for folder in results.exported():
    apply(folder.name, folder)
results.save()
