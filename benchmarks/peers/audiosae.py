"""AudioSAE (arXiv 2602.05027): the S-vector, and steering the SAE's reconstruction.

Both are fitted on non-speech calibration clips labelled by no_speech_prob < 0.5 (the paper's tau) and work
on the encoder's last layer (the caption of its Table 2).

Alpha is taken to count in units of the activation itself, along vectors of unit length: so it is with an SAE
whose decoder rows have length 1. Read as multiples of the activation's own length, alpha 1 on 100 latents
would bury it, while the paper loses 0.4 points of WER there. SAEs stored in other units are converted.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.availability import CALIBRATION, SAES
from benchmarks.methods import Method, Setup
from benchmarks.peers import pooling
from benchmarks.peers.intervention import EditMethod

if TYPE_CHECKING:
    from whisper_steer.sae import SparseAutoencoder
    from whisper_steer.steering import LatentEdit, Shift

ALPHAS = (0.5, 1.0, 3.0)
TOP_K = (1, 5, 10, 100)
LABELS = ("nsp", "hr", "text")  # the published one first; the others where it cannot split the clips


def svector(layer: int, mean: np.ndarray, hallucinated: np.ndarray) -> Shift:
    """(mean act_H - mean act_N) / norm, pointed from H to N so that adding it suppresses; strength 1.

    mean: (clips, d_model) mean activations; hallucinated: (clips,) bool.
    """
    from calibration.edit_fit import mean_difference

    return mean_difference(layer, mean, hallucinated, normalised=True)


def reconstruction_edit(sae: SparseAutoencoder, beta: np.ndarray, k: int) -> LatentEdit:
    """x' = decoder(f(x) + alpha s), s_j = -sign(beta_j) for the k largest |beta_j|, else 0; strength 1.

    beta: (n_latents,) of the logistic regression. s is divided by the length of the latent's decoder row, so
    that alpha 1 moves the activation by a vector of length 1 per latent whatever scale the SAE is stored in.
    """
    from calibration.edit_fit import top_latents
    from whisper_steer.steering import LatentEdit

    chosen = torch.from_numpy(top_latents(beta, k))
    values = torch.zeros(sae.n_latents)
    lengths = sae.W_dec.detach().float().norm(dim=-1).clamp_min(1e-12)
    signs = torch.from_numpy(-np.sign(beta).astype(np.float32))
    values[chosen] = (signs / lengths.cpu())[chosen]
    return LatentEdit.from_sae(sae, None, values, mode="add", reconstruct=True)


def fit_svector(setup: Setup) -> Shift:
    """On the calibration clips. Raises Unavailable."""
    pooled = pooling.pool(setup, pooling.last_layer(setup), LABELS)
    return svector(pooled.layer, pooled.clips.mean, pooled.hallucinated)


def fit_reconstruction(setup: Setup, k: int) -> LatentEdit:
    """On the calibration clips. Raises Unavailable (no SAE, or no two classes of clips)."""
    layer = pooling.last_layer(setup)
    sae = pooling.sae_of(setup, layer)
    pooled = pooling.pool(setup, layer, LABELS)
    return reconstruction_edit(sae, pooling.regression(setup, pooled).beta, k)


def _reconstruction_method(k: int) -> EditMethod:
    return EditMethod(
        name=f"audiosae-sae-k{k}",
        strengths=ALPHAS,
        quick_strengths=ALPHAS if k == max(TOP_K) else ALPHAS[-1:],
        about=(
            f"AudioSAE's steering of {k} SAE latent{'s' if k > 1 else ''}, the reconstruction replaces the "
            "last encoder layer's activation (arXiv 2602.05027); strength: its alpha"
        ),
        edit=partial(fit_reconstruction, k=k),
        needs=(CALIBRATION, SAES, "sklearn"),
    )


METHODS: tuple[Method, ...] = (
    EditMethod(
        name="audiosae-svector",
        strengths=ALPHAS,
        quick_strengths=ALPHAS[1:],
        about=(
            "AudioSAE's S-vector: from the mean activation of hallucinated clips to that of the others, unit "
            "length, last encoder layer (arXiv 2602.05027); strength: its alpha"
        ),
        edit=fit_svector,
    ),
    *(_reconstruction_method(k) for k in TOP_K),
)
