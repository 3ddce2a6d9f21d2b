"""Whether an SAE trains faster by sparse gradients or by autograd's dense ones, measured where it will train.

On a CPU sparse wins at every size that was measured (docs/kernels.md). On a GPU it depends on k / n, the
width and the GPU: so a few steps of both are timed on made-up frames before the run.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from calibration.sae_training import SAETrainer

logger = logging.getLogger("whisper_steer")

WARM_UP, TIMED = 2, 3


@dataclass(frozen=True)
class TrainingChoice:
    """sparse: what to train with; sparse_s, dense_s: seconds a step took, the shortest of some."""

    sparse: bool
    sparse_s: float
    dense_s: float


@lru_cache(maxsize=64)
def measured_choice(
    activation: str, d_model: int, n_latents: int, k: int | None, batch: int, device: str, autocast: bool
) -> TrainingChoice:
    """Time steps of both kinds on `batch` random frames; the answer is kept for the process, and logged.

    Variants without a sparse form (JumpReLU, ReLU) are not timed: their choice is dense. Waits for the
    device, and holds one SAE with its optimiser at a time meanwhile.
    """
    x = torch.randn(batch, d_model, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = {}
    for sparse in (True, False):
        trainer = SAETrainer(
            0, d_model, n_latents, activation=activation, k=k, sparse=sparse, device=device, autocast=autocast
        )
        if trainer.sparse != sparse:
            return TrainingChoice(False, float("inf"), 0.0)
        seconds[sparse] = _shortest(trainer, x)
        del trainer
    choice = TrainingChoice(seconds[True] < seconds[False], seconds[True], seconds[False])
    logger.info(
        "training %s, d %d, %d latents, k %s on %s: %s gradients "
        "(a step of %d frames: sparse %.1f ms, dense %.1f ms)",
        activation, d_model, n_latents, k, device, "sparse" if choice.sparse else "dense", batch,
        1e3 * choice.sparse_s, 1e3 * choice.dense_s,
    )  # fmt: skip
    return choice


def _shortest(trainer: SAETrainer, x: torch.Tensor) -> float:
    best = float("inf")
    for step in range(WARM_UP + TIMED):
        _wait(x)
        start = time.perf_counter()
        trainer.step(x, lr_factor=0.0)
        _wait(x)
        if step >= WARM_UP:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
