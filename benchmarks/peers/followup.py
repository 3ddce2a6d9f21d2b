"""AudioSAE's follow-up (arXiv 2606.07473): the activation vector, and additive steering of scaled latents.

Both are fitted on non-speech calibration clips and work on the encoder's last layer. A clip counts as
hallucinated if openai-whisper's skip rule would keep it (no_speech_prob < 0.6 or avg_logprob > -1.0, greedy).
Written from secondary accounts of the paper, not from its own text; figures and k are those for small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.availability import CALIBRATION, SAES
from benchmarks.methods import Method, Setup
from benchmarks.peers import pooling
from benchmarks.peers.intervention import EditMethod

if TYPE_CHECKING:
    from whisper_steer.sae import SparseAutoencoder
    from whisper_steer.steering import LatentEdit, Shift

LABELS = ("hr", "nsp", "text")  # the published one first; the others where it cannot split the clips
TOP_K = 25


def activation_vector(layer: int, mean: np.ndarray, hallucinated: np.ndarray) -> Shift:
    """Mean of the others minus mean of the hallucinated clips, not normalised; strength 1.

    mean: (clips, d_model) mean activations; hallucinated: (clips,) bool.
    """
    from calibration.edit_fit import mean_difference

    return mean_difference(layer, mean, hallucinated, normalised=False)


def latent_edit(sae: SparseAutoencoder, beta: np.ndarray, mean_activation: np.ndarray, k: int) -> LatentEdit:
    """The k largest |beta_j| among latents that fire, shifted by -sign(beta_j) times their mean activation;
    the SAE's error is kept, codes do not fall below 0; strength 1.

    beta, mean_activation: (n_latents,).
    """
    from calibration.edit_fit import additive_edit

    return additive_edit(sae, beta, mean_activation, k)


def fit_activation_vector(setup: Setup) -> Shift:
    """On the calibration clips. Raises Unavailable."""
    pooled = pooling.pool(setup, pooling.last_layer(setup), LABELS)
    return activation_vector(pooled.layer, pooled.clips.mean, pooled.hallucinated)


def fit_latents(setup: Setup) -> LatentEdit:
    """On the calibration clips. Raises Unavailable (no SAE, or no two classes of clips)."""
    layer = pooling.last_layer(setup)
    sae = pooling.sae_of(setup, layer)
    pooled = pooling.pool(setup, layer, LABELS)
    beta = pooling.regression(setup, pooled).beta
    return latent_edit(sae, beta, pooled.clips.mean_activation, TOP_K)


METHODS: tuple[Method, ...] = (
    EditMethod(
        name="followup-activation",
        strengths=(1.0, 2.0, 4.0, 8.0),
        quick_strengths=(2.0, 8.0),
        about=(
            "The follow-up's activation vector: mean of clips without minus mean of clips with a "
            "hallucination, not normalised, last encoder layer (arXiv 2606.07473); strength: its alpha, "
            "published: 8"
        ),
        edit=fit_activation_vector,
    ),
    EditMethod(
        name=f"followup-latents-k{TOP_K}",
        strengths=(1.0, 3.0, 5.0),
        quick_strengths=(3.0,),
        about=(
            f"The follow-up's shift of {TOP_K} SAE latents, each by its own mean activation, last "
            "encoder layer (arXiv 2606.07473); strength: its alpha, published: 3"
        ),
        edit=fit_latents,
        needs=(CALIBRATION, SAES, "sklearn"),
    ),
)
