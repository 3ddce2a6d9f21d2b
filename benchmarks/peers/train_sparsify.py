"""sparsify: its SparseCoder and the step of its Trainer's `fit`, with either of two of its optimisers.

`Trainer.fit` gets its activations from hooks on a running language model; the lines below are its step on
activations that exist already, in its order: unit-norm decoder, forward, loss = fvu, backward, gradient
made tangential, optimiser, schedule, count of fired latents. Variants: adam, and signum (its default: sign
SGD with momentum, schedule-free, so without warm-up and decay).
"""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder
from torch import Tensor
from transformers import get_linear_schedule_with_warmup
from worker import Request, Weights, main


class Trainee:
    def __init__(self, request: Request, d_model: int):
        torch.set_float32_matmul_precision("high")  # as fit does
        config = SparseCoderConfig(num_latents=request.n_latents, k=request.k)
        self.sae = SparseCoder(d_model, config, request.device, dtype=torch.float32)
        self.optimizer: Any
        self.scheduler: Any = None
        if request.variant == "adam":
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=request.lr)
            self.scheduler = get_linear_schedule_with_warmup(self.optimizer, request.warmup, request.steps)
        elif request.variant == "signum":
            self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=request.lr), momentum=0.95)
            self.optimizer.train()
        else:
            raise ValueError(f"unknown variant {request.variant!r}")
        self.since_fired = torch.zeros(request.n_latents, device=request.device, dtype=torch.long)
        self.fired = torch.zeros(request.n_latents, device=request.device, dtype=torch.bool)

    def step(self, index: int, x: Tensor) -> None:
        if index == 0:
            self.sae.b_dec.data = x.mean(0)
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        with torch.no_grad():
            self.since_fired += len(x)
            self.since_fired[self.fired] = 0
            self.fired.zero_()

    def weights(self) -> Weights:
        """As its checkpoints hold them: schedule-free weights averaged. Encoder's input is x - b_dec."""
        if isinstance(self.optimizer, ScheduleFreeWrapper):
            self.optimizer.eval()
        W_enc, b_dec = self.sae.encoder.weight, self.sae.b_dec
        return Weights(W_enc, self.sae.encoder.bias - W_enc @ b_dec, self.sae.W_dec, b_dec)


if __name__ == "__main__":
    main(Trainee)
