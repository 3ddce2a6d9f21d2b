"""One layer's SAE while it learns: the step, its optimiser, and what a checkpoint keeps of it.

Training works on z = (x - mean) / scale, with scale such that z has unit root-mean-square norm, so that one
learning rate and one sparsity fit every layer. `export` folds both into the weights: the exported SAE takes
x itself.

For BatchTopK and TopK on a CPU only k of n codes per frame are non-zero, and everything after the encoder's
product runs on those alone (2.6 of 3.2 GFLOP per 1,000 frames saved at d 192, n 1536); the gradients are
written out below and tested against autograd. Other activations and devices use autograd.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_steer.activation_functions import BatchTopK, JumpReLU, ReLU, TopK, l1_loss, make
from whisper_steer.sae import SparseAutoencoder

# share of the last step's smallest kept value above which a pre-activation is looked at when the largest k
# x B are sought; only speed depends on it: with fewer candidates than wanted, all are looked at
_CANDIDATE_MARGIN = 0.8


@lru_cache(maxsize=1)
def sparse_kernels_work() -> bool:
    """Whether torch's sparse products run here (on a CPU they need MKL)."""
    with warnings.catch_warnings():
        # torch says once per process that CSR tensors are in beta
        warnings.simplefilter("ignore", UserWarning)
        try:
            offsets, columns = torch.tensor([0, 1]), torch.tensor([0])
            matrix = torch.sparse_csr_tensor(offsets, columns, torch.ones(1), (1, 1), check_invariants=False)
            torch.sparse.sampled_addmm(matrix, torch.ones(1, 1), torch.ones(1, 1), beta=0.0)
            return bool((matrix @ torch.ones(1, 1)).item() == 1)
        except RuntimeError:
            return False


@dataclass(frozen=True)
class SparseCodes:
    """Non-zero codes of a batch, row by row: values, their columns, and the offset of each row (CSR).

    order: for a transpose, where its values stood in the original.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]
    order: Tensor | None = None

    @classmethod
    def at(cls, flat: Tensor, values: Tensor, shape: tuple[int, int]) -> SparseCodes:
        """From ascending flat indices into a (frames, latents) matrix."""
        rows = torch.div(flat, shape[1], rounding_mode="floor")
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        return cls(offsets, flat - rows * shape[1], values, shape)

    def matrix(self, values: Tensor | None = None) -> Tensor:
        chosen = self.values if values is None else values
        return torch.sparse_csr_tensor(self.offsets, self.columns, chosen, self.shape, check_invariants=False)

    def times(self, weights: Tensor) -> Tensor:
        """codes (B, n) @ weights (n, d)."""
        return self.matrix() @ weights

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left[row] . right[column] for every non-zero: left (B, d), right (n, d)."""
        sampled = torch.sparse.sampled_addmm(self.matrix(), left, right.T.contiguous(), beta=0.0)
        return sampled.values()

    def transposed(self) -> SparseCodes:
        """The (n, B) transpose; `order` says where each value went."""
        order = torch.argsort(self.columns, stable=True)
        offsets = torch.zeros(self.shape[1] + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(self.columns, minlength=self.shape[1]).cumsum(0)
        rows = torch.repeat_interleave(torch.arange(self.shape[0]), self.offsets.diff())
        return SparseCodes(offsets, rows[order], self.values[order], (self.shape[1], self.shape[0]), order)


class LayerTrainer:
    """Trains the SAE of one layer.

    Attributes:
        sae: in the space of z; use `export` for the one to save.
        form: the training form of its activation function.
        mean, scale: of the layer's activations, set by `set_normalisation`.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_latents: int,
        *,
        activation: str = "batchtopk",
        k: int | None = 16,
        lr: float = 2e-3,
        sparsity: float = 1.0,
        seed: int = 0,
        sparse: bool | None = None,
    ):
        """sparsity: weight of the sparsity loss of jumprelu (target k) and relu (L1). sparse: None = where
        it works.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1009 + layer)
            self.sae = SparseAutoencoder(d_model, n_latents, activation=activation, k=k, layer=layer)
        # JumpReLU's thresholds must live where pre-activations of a unit-norm input do, or no gradient
        # reaches them
        options: dict[str, Any] = (
            {"initial_theta": 0.05, "bandwidth": 0.05} if activation == "jumprelu" else {}
        )
        self.form: BatchTopK | TopK | JumpReLU | ReLU = make(activation, n_latents, k, **options)
        self.form.train()
        self.layer, self.k, self.sparsity = layer, k, sparsity
        by_topk = isinstance(self.form, (BatchTopK, TopK))
        self.sparse = by_topk and (sparse_kernels_work() if sparse is None else sparse)
        self.base_lr = lr
        parameters = [*self.sae.parameters(), *self.form.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))
        self.mean = torch.zeros(d_model)
        self.scale = 1.0
        self._last_smallest = 0.0

    def set_normalisation(self, x: Tensor, *, centre: bool) -> None:
        """Take mean and scale from activations x (frames, d_model); b_dec then starts at the mean of z,
        zero.
        """
        mean = x.double().mean(dim=0) if centre else torch.zeros(x.shape[1], dtype=torch.float64)
        self.mean = mean.float()
        self.scale = float((x.double() - mean).square().sum(dim=1).mean().sqrt()) or 1.0

    def normalised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def step(self, x: Tensor, *, lr_factor: float = 1.0, sparsity_factor: float = 1.0) -> float:
        """One optimiser step on activations x (frames, d_model); returns the mean squared error per frame
        of z (z has mean squared norm 1, so with centring this is the fraction of variance unexplained).
        """
        z = self.normalised(x)
        self.optimizer.zero_grad(set_to_none=True)
        error = self._sparse_gradients(z) if self.sparse else self._dense_gradients(z, sparsity_factor)
        self._keep_gradient_tangential()
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * lr_factor
        self.optimizer.step()
        with torch.no_grad():
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
        return error

    def _dense_gradients(self, z: Tensor, sparsity_factor: float) -> float:
        pre = self.sae.pre_activations(z)
        codes = self.form(pre)
        error = (self.sae.decode(codes) - z).square().sum(dim=1).mean()
        loss = error
        if isinstance(self.form, JumpReLU):
            target = None if self.k is None else float(self.k)
            loss = loss + self.sparsity * sparsity_factor * self.form.l0_loss(pre, target=target)
        elif isinstance(self.form, ReLU):
            loss = loss + self.sparsity * sparsity_factor * l1_loss(codes, self.sae.W_dec)
        loss.backward()
        return float(error.detach())

    @torch.no_grad()
    def _sparse_gradients(self, z: Tensor) -> float:
        """The same loss and gradients as autograd's, from the non-zero codes alone.

        error = mean_i |x^_i - z_i|^2, g = d error / d x^ = 2 (x^ - z) / B. Then dW_dec = f^T g, db_dec =
        sum g, and for each non-zero code d pre = g_i . W_dec[j] (ReLU's slope is 1 there), dW_enc = (d
        pre)^T z, db_enc = sum.
        """
        sae = self.sae
        pre = sae.pre_activations(z)
        codes = self._largest(pre)
        difference = codes.times(sae.W_dec) + sae.b_dec - z
        g = difference * (2 / len(z))
        slopes = codes.products(g, sae.W_dec)
        turned = codes.transposed()
        sae.W_dec.grad = turned.matrix() @ g
        sae.b_dec.grad = g.sum(dim=0)
        sae.W_enc.grad = turned.matrix(slopes[turned.order]) @ z
        sae.b_enc.grad = torch.zeros_like(sae.b_enc).index_add_(0, codes.columns, slopes)
        return float(difference.square().sum() / len(z))

    def _largest(self, pre: Tensor) -> SparseCodes:
        """The codes that the training form keeps, without those that are zero anyway."""
        if isinstance(self.form, BatchTopK):
            return self._largest_of_batch(pre, self.form)
        columns = pre.topk(min(self.k or 0, pre.shape[1]), dim=1, sorted=False).indices
        rows = torch.arange(len(pre))[:, None] * pre.shape[1]
        flat = (columns + rows).flatten().sort().values
        values = pre.flatten()[flat]
        return SparseCodes.at(flat[values > 0], values[values > 0], (pre.shape[0], pre.shape[1]))

    def _largest_of_batch(self, pre: Tensor, form: BatchTopK) -> SparseCodes:
        # numpy: several times as fast as torch's nonzero and topk on a CPU
        everything = pre.numpy().reshape(-1)
        wanted = min(form.k * len(pre), everything.size)
        kept = np.flatnonzero(everything > self._last_smallest * _CANDIDATE_MARGIN)
        if len(kept) < wanted and self._last_smallest > 0:
            kept = np.flatnonzero(everything > 0)
        if len(kept) > wanted:
            largest = np.argpartition(everything[kept], len(kept) - wanted)[-wanted:]
            kept = kept[np.sort(largest)]
        values = torch.from_numpy(everything[kept])
        if len(values):
            self._last_smallest = float(values.min())
            # the training form's running mean, which it cannot update itself as its forward is bypassed
            weight = 1.0 if form.steps == 0 else 1 - form.momentum
            form.smallest_kept.lerp_(torch.tensor(self._last_smallest), weight)
            form.steps += 1
        return SparseCodes.at(torch.from_numpy(kept), values, (pre.shape[0], pre.shape[1]))

    @torch.no_grad()
    def _keep_gradient_tangential(self) -> None:
        """Remove what would only change the decoder rows' lengths, which are put back to 1 after the step."""
        gradient, rows = self.sae.W_dec.grad, self.sae.W_dec
        if gradient is not None:
            gradient -= (gradient * rows).sum(dim=1, keepdim=True) * rows

    @torch.no_grad()
    def export(self) -> SparseAutoencoder:
        """The SAE on x itself, with the form's threshold, scale and mean folded in: same codes."""
        sae = SparseAutoencoder(
            self.sae.d_model, self.sae.n_latents, activation=self.sae.activation, k=self.k, layer=self.layer
        )
        sae.load_state_dict(self.sae.state_dict())
        sae.theta.copy_(self.form.theta())
        return sae.fold_input_scale(self.scale).fold_mean(self.mean).eval().requires_grad_(False)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors under `prefix`."""
        tensors = {f"{prefix}sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= {f"{prefix}form.{name}": value for name, value in self.form.state_dict().items()}
        tensors |= {
            f"{prefix}mean": self.mean,
            f"{prefix}scale": torch.tensor(self.scale, dtype=torch.float64),
        }
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{prefix}adam.{index}.{name}": value for name, value in values.items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Continue where `state` was taken."""

        def under(part: str) -> dict[str, Tensor]:
            start = prefix + part
            return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}

        self.sae.load_state_dict(under("sae."))
        self.form.load_state_dict(under("form."))
        self.mean, self.scale = tensors[f"{prefix}mean"], float(tensors[f"{prefix}scale"])
        optimizer = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in under("adam.").items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
