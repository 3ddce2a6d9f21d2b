"""SAELens: SAETrainer.step on its training SAEs, which export themselves.

Variants: batchtopk; topk with dense codes, and topk-sparse with `use_sparse_activations`, which SAELens
recommends for float32 without autocast. The latter without rescaling by decoder norms, SAELens' default
otherwise: torch has no backward for that on sparse CPU tensors.
"""

from __future__ import annotations

from typing import Any

from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from worker import Request, Weights, main


def _training_sae(request: Request, d_model: int) -> Any:
    sizes: dict[str, Any] = {
        "d_in": d_model,
        "d_sae": request.n_latents,
        "k": request.k,
        "device": request.device,
    }
    if request.variant == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes))
    sparse = {"topk": False, "topk-sparse": True}[request.variant]
    config = TopKTrainingSAEConfig(
        **sizes, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse
    )
    return TopKTrainingSAE(config)


class Trainee:
    def __init__(self, request: Request, d_model: int):
        self.sae = _training_sae(request, d_model)
        config = SAETrainerConfig(
            total_training_samples=request.steps * request.batch,
            train_batch_size_samples=request.batch,
            lr=request.lr,
            lr_end=request.lr,
            lr_warm_up_steps=request.warmup,
            lr_decay_steps=request.decay,
            device=request.device,
            autocast=request.dtype == "bfloat16",
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer: Any = SAETrainer(config, self.sae, data_provider=iter(()))

    def step(self, index: int, x: Tensor) -> object:
        self.trainer.maybe_reset_sparsity()
        output = self.trainer.step(x)
        self.trainer.n_training_steps += 1
        return output

    def weights(self) -> Weights:
        """The state dict that SAELens saves for inference: decoder norms folded. Its W_enc is (d, n)."""
        state = self.sae.state_dict()
        self.sae.process_state_dict_for_saving_inference(state)
        b_enc = state["b_enc"]
        if self.sae.cfg.apply_b_dec_to_input:
            b_enc = b_enc - state["b_dec"] @ state["W_enc"]
        return Weights(state["W_enc"].T, b_enc, state["W_dec"], state["b_dec"])


if __name__ == "__main__":
    main(Trainee)
