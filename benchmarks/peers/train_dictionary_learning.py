"""dictionary_learning: BatchTopKTrainer or TopKTrainer, its `update` as its `trainSAE` calls it."""

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor
from worker import Request, Weights, main

VARIANTS: dict[str, Any] = {"batchtopk": BatchTopKTrainer, "topk": TopKTrainer}


class Trainee:
    def __init__(self, request: Request, d_model: int):
        self.trainer = VARIANTS[request.variant](
            steps=request.steps,
            activation_dim=d_model,
            dict_size=request.n_latents,
            k=request.k,
            layer=0,
            lm_name="activations",
            lr=request.lr,
            warmup_steps=request.warmup,
            decay_start=request.steps - request.decay if request.decay else None,
            seed=request.seed,
            device=request.device,
        )
        self.autocast = torch.autocast(
            request.device.split(":")[0], dtype=torch.bfloat16, enabled=request.dtype == "bfloat16"
        )

    def step(self, index: int, x: Tensor) -> float:
        with self.autocast:
            return self.trainer.update(index, x)

    def weights(self) -> Weights:
        """The encoder's input is x - b_dec: folded into b_enc."""
        ae = self.trainer.ae
        W_enc, b_dec = ae.encoder.weight, ae.b_dec
        return Weights(W_enc, ae.encoder.bias - W_enc @ b_dec, ae.decoder.weight.T, b_dec)


if __name__ == "__main__":
    main(Trainee)
