"""How good an SAE is, measured in one way for every library: on held-out frames, from its weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

RULES = ("batchtopk", "topk")


@dataclass(frozen=True)
class Quality:
    """On held-out frames.

    Attributes:
        fvu: fraction of variance unexplained, sum |x - x^|^2 / sum |x - mean|^2; 0 is perfect.
        l0: mean number of latents above zero per frame.
        alive: share of latents above zero in at least one frame, 0..1.
    """

    fvu: float
    l0: float
    alive: float


def select(pre: Tensor, k: int, rule: str) -> Tensor:
    """Codes (B, n) of pre-activations (B, n): ReLU, then the k largest of every row ("topk") or the k x B
    largest of all ("batchtopk"), zero elsewhere.
    """
    positive = pre.relu()
    if rule == "topk":
        kept = positive.topk(min(k, positive.shape[1]), dim=1, sorted=False)
        return torch.zeros_like(positive).scatter_(1, kept.indices, kept.values)
    if rule != "batchtopk":
        raise ValueError(f"unknown rule {rule!r}: expected one of {', '.join(RULES)}")
    flat = positive.flatten()
    largest = flat.topk(min(k * len(positive), len(flat)), sorted=False)
    return torch.zeros_like(flat).scatter_(0, largest.indices, largest.values).view_as(positive)


@torch.no_grad()
def measure(weights: Mapping[str, Tensor], frames: Tensor, *, k: int, rule: str, batch: int) -> Quality:
    """Quality of an SAE under its training rule, `batch` frames at a time.

    Args:
        weights: W_enc, W_dec (n, d), b_enc (n,), b_dec (d,); codes = select(W_enc x + b_enc).
        frames: (frames, d) float32.
    """
    W_enc, b_enc, W_dec, b_dec = (weights[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    error, active = 0.0, 0
    ever = torch.zeros(len(W_enc), dtype=torch.bool)
    for x in frames.split(batch):
        codes = select(linear(x, W_enc, b_enc), k, rule)
        error += float((codes @ W_dec + b_dec - x).square().sum(dtype=torch.float64))
        fires = codes > 0
        active += int(fires.sum())
        ever |= fires.any(dim=0)
    variance = float((frames - frames.mean(dim=0)).square().sum(dtype=torch.float64))
    return Quality(
        fvu=error / variance if variance else float("nan"),
        l0=active / len(frames),
        alive=float(ever.float().mean()),
    )
