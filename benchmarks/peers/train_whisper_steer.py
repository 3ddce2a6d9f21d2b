"""whisper-steer: SAETrainer, one SAE on its own.

Variants: batchtopk and topk, as trained by default; batchtopk-float32: without finding BatchTopK's
candidates in bfloat16, which the default does on CPUs that multiply it in hardware.
"""

from __future__ import annotations

from torch import Tensor
from worker import Request, Weights, main

from calibration.sae_training import SAETrainer

VARIANTS: dict[str, tuple[str, bool | None]] = {
    "batchtopk": ("batchtopk", None),
    "batchtopk-float32": ("batchtopk", False),
    "topk": ("topk", None),
}


class Trainee:
    def __init__(self, request: Request, d_model: int):
        self.request = request
        activation, screen = VARIANTS[request.variant]
        self.trainer = SAETrainer(
            0,
            d_model,
            request.n_latents,
            activation=activation,
            k=request.k,
            lr=request.lr,
            seed=request.seed,
            screen=screen,
            device=request.device,
            autocast=request.dtype == "bfloat16",
        )

    def _lr_factor(self, index: int) -> float:
        request = self.request
        if index < request.warmup:
            return (index + 1) / request.warmup
        return min(1.0, (request.steps - index) / max(1, request.decay))

    def step(self, index: int, x: Tensor) -> object:
        if index == 0:
            self.trainer.set_normalisation(x, centre=True)
        return self.trainer.step(x, lr_factor=self._lr_factor(index))

    def weights(self) -> Weights:
        sae = self.trainer.export()
        return Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)


if __name__ == "__main__":
    main(Trainee)
