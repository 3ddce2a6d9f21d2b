"""What turns an SAE's pre-activations into sparse codes: BatchTopK, TopK, JumpReLU, ReLU.

Two forms of each, side by side. The *inference* form is a plain function of the pre-activations and a stored
threshold. The *training* form is a small module: `forward(pre, mask)` makes the codes of a batch, `theta()`
gives the per-latent threshold to store for inference.

Shapes: pre and codes (..., n_latents); mask (...) bool, True = a real frame, False = padding (gets zero
codes and does not count); theta (n_latents,) or broadcastable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError

ACTIVATIONS = ("batchtopk", "topk", "jumprelu", "relu")


# ---------- inference forms


def threshold(pre: Tensor, theta: Tensor) -> Tensor:
    """Inference form of BatchTopK and JumpReLU: f = relu(pre) where pre > theta, else 0.

    Elementwise, so any subset of latents can be computed alone and a frame does not depend on its neighbours.
    """
    return torch.where(pre > theta, pre.relu(), _zero_like(pre))


def topk(pre: Tensor, k: int) -> Tensor:
    """TopK: keeps the k largest relu'd pre-activations of every frame (exactly k of them under ties)."""
    codes = pre.relu()
    values, indices = codes.topk(min(k, codes.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(codes).scatter(-1, indices, values)


# ---------- training forms


class BatchTopK(nn.Module):
    """Keeps the k x B largest ReLU pre-activations of the B real frames of a batch, wherever they fall.

    Source: Bussmann et al. 2024, arXiv 2412.06410. That choice depends on the whole batch, so a running mean
    of the smallest kept value is tracked; inference is `threshold` with it. It is a buffer because it must
    be saved with the training state but gets no gradient.
    """

    smallest_kept: Tensor
    steps: Tensor

    def __init__(self, n_latents: int, k: int, *, momentum: float = 0.99) -> None:
        """momentum: weight of the past in the running mean (0.99 averages over about 100 steps)."""
        super().__init__()
        _check_k(k)
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum is {momentum}: expected 0 <= momentum < 1")
        self.n_latents, self.k, self.momentum = n_latents, k, momentum
        self.register_buffer("smallest_kept", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, pre: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of a batch; in training mode also updates the running threshold (if anything was kept)."""
        codes = _masked(pre.relu(), mask)
        with torch.no_grad():
            flat = codes.detach().reshape(-1)
            kept = self._largest(flat, self.k * _count(codes, mask))
            if self.training and kept.numel() > 0:
                self._track(flat[kept].min())
            keep = torch.zeros_like(flat, dtype=torch.bool)
            keep[kept] = True
        return torch.where(keep.reshape(codes.shape), codes, _zero_like(codes))

    def _largest(self, flat: Tensor, count: int) -> Tensor:
        """Indices of the `count` largest positive values, or of all positive ones if there are fewer."""
        # Exact and several times faster than topk over everything: if enough values exceed a guess somewhat
        # below the usual threshold, the largest are among them.
        for guess in (0.7 * self.smallest_kept, torch.zeros_like(self.smallest_kept)):
            candidates = (flat > guess).nonzero().squeeze(1)
            if candidates.numel() >= count:
                return candidates[flat[candidates].topk(count, sorted=False).indices]
        return candidates

    def _track(self, smallest: Tensor) -> None:
        smallest = smallest.to(self.smallest_kept.dtype)
        weight = torch.where(self.steps == 0, 1.0, 1 - self.momentum)
        self.smallest_kept.lerp_(smallest, weight.to(smallest.dtype))
        self.steps += 1

    def theta(self) -> Tensor:
        """(n_latents,): the tracked threshold, one value for all latents."""
        return self.smallest_kept.expand(self.n_latents).clone()

    def inference(self, pre: Tensor) -> Tensor:
        return threshold(pre, self.smallest_kept)


class TopK(nn.Module):
    """Keeps the k largest ReLU pre-activations of each frame: Gao et al. 2024, arXiv 2406.04093."""

    def __init__(self, n_latents: int, k: int) -> None:
        super().__init__()
        _check_k(k)
        self.n_latents, self.k = n_latents, k

    def forward(self, pre: Tensor, mask: Tensor | None = None) -> Tensor:
        return _masked(topk(pre, self.k), mask)

    def theta(self) -> Tensor:
        """(n_latents,) zeros: TopK has no threshold."""
        return torch.zeros(self.n_latents)

    def inference(self, pre: Tensor) -> Tensor:
        return topk(pre, self.k)


class JumpReLU(nn.Module):
    """f = pre where pre > theta, else 0, with a learnt theta > 0 per latent: Rajamanoharan et al. 2024,
    arXiv 2407.14435.

    The jump has no useful gradient for theta; a straight-through estimator takes the one of the jump
    smoothed with a rectangle kernel of width `bandwidth` (in units of the pre-activations).
    """

    def __init__(self, n_latents: int, *, initial_theta: float = 1e-3, bandwidth: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("initial_theta", initial_theta), ("bandwidth", bandwidth)):
            if not value > 0:
                raise UsageError(f"{name} is {value}: expected a number > 0")
        self.n_latents, self.bandwidth = n_latents, bandwidth
        # the logarithm keeps theta positive whatever the optimiser does
        self.log_theta = nn.Parameter(torch.full((n_latents,), float(initial_theta)).log())

    def forward(self, pre: Tensor, mask: Tensor | None = None) -> Tensor:
        codes = _Jump.apply(pre, self.log_theta.exp(), self.bandwidth)
        return _masked(codes, mask)

    def l0_loss(self, pre: Tensor, mask: Tensor | None = None, *, target: float | None = None) -> Tensor:
        """Mean number of active latents per real frame, differentiable in theta by the same estimator.

        target: if given, the loss is (L0 / target - 1)^2 instead. 0 for a batch without frames.
        """
        active = _masked(_Step.apply(pre, self.log_theta.exp(), self.bandwidth), mask)
        l0 = active.sum() / max(_count(active, mask), 1)
        return l0 if target is None else (l0 / target - 1) ** 2

    def theta(self) -> Tensor:
        """(n_latents,): the learnt thresholds."""
        return self.log_theta.detach().exp()

    def inference(self, pre: Tensor) -> Tensor:
        return threshold(pre, self.log_theta.exp())


class ReLU(nn.Module):
    """f = max(pre, 0); made sparse by an L1 loss: Bricken et al. 2023, "Towards Monosemanticity"."""

    def __init__(self, n_latents: int) -> None:
        super().__init__()
        self.n_latents = n_latents

    def forward(self, pre: Tensor, mask: Tensor | None = None) -> Tensor:
        return _masked(pre.relu(), mask)

    def theta(self) -> Tensor:
        """(n_latents,) zeros."""
        return torch.zeros(self.n_latents)

    def inference(self, pre: Tensor) -> Tensor:
        return pre.relu()


def l1_loss(codes: Tensor, W_dec: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real frames of sum_j |f_j| ||W_dec[j]||: weighted by the decoder rows' lengths, so that
    shrinking the codes and growing the rows gains nothing. codes (..., n_latents), W_dec (n_latents,
    d_model)."""
    weighted = _masked(codes, mask).abs() @ W_dec.norm(dim=-1)
    return weighted.sum() / max(_count(codes, mask), 1)


def make(
    activation: str, n_latents: int, k: int | None = None, **options: Any
) -> BatchTopK | TopK | JumpReLU | ReLU:
    """The training form by name; `options` go to its constructor. Raises UsageError for an unknown name or
    lacking k."""
    check_activation(activation, k)
    if activation == "batchtopk":
        return BatchTopK(n_latents, int(k or 0), **options)
    if activation == "topk":
        return TopK(n_latents, int(k or 0), **options)
    return JumpReLU(n_latents, **options) if activation == "jumprelu" else ReLU(n_latents, **options)


def check_activation(activation: str, k: int | None) -> None:
    """Raises UsageError unless `activation` is known and has the k that it needs."""
    if activation not in ACTIVATIONS:
        raise UsageError(f"activation is {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if activation in ("batchtopk", "topk"):
        _check_k(k)


def _check_k(k: int | None) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UsageError(f"k is {k!r}: expected a whole number >= 1, the latents to keep per frame")


def _masked(codes: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return codes
    if mask.shape != codes.shape[:-1]:
        expected = tuple(codes.shape[:-1])
        raise UsageError(f"mask has shape {tuple(mask.shape)}: expected one flag per frame, {expected}")
    return torch.where(mask.unsqueeze(-1), codes, _zero_like(codes))


def _zero_like(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device)


def _count(codes: Tensor, mask: Tensor | None) -> int:
    """Number of real frames."""
    return codes.shape[:-1].numel() if mask is None else int(mask.sum())


class _Jump(torch.autograd.Function):
    """z -> z H(z - theta); d/dz = H(z - theta), d/dtheta = -(theta / eps) K((z - theta) / eps)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return threshold(pre, theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2).to(gradient.dtype)
        to_theta = -(theta / ctx.bandwidth) * near * gradient
        return gradient * (pre > theta), _summed_like(to_theta, theta), None


class _Step(torch.autograd.Function):
    """z -> H(z - theta); d/dz = 0, d/dtheta = -(1 / eps) K((z - theta) / eps)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = gradients
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2).to(gradient.dtype)
        return None, _summed_like(-near * gradient / ctx.bandwidth, theta), None


def _summed_like(gradient: Tensor, theta: Tensor) -> Tensor:
    return gradient.reshape(-1, theta.shape[-1]).sum(0)
