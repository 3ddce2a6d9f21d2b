"""One SAE while it learns: the step, its optimiser, and what a checkpoint keeps of it.

Training works on z = (x - mean) / scale, with scale such that z has unit root-mean-square norm (AudioSAE,
arXiv 2602.05027: "scaled to unit norm"), so that one learning rate and one sparsity fit every layer.
`export` folds both into the weights: the exported SAE takes x itself.

For BatchTopK, TopK and Matryoshka everything after the encoder's product can run on the non-zero codes alone;
the gradients are written out below and tested against autograd. On a CPU that is always faster; on a GPU the
engine measures which is (training_choice.py). Other variants use autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.collectives import ALONE, Collective
from calibration.sparse_codes import (
    LargestOfBatch,
    LargestOfFrame,
    SparseCodes,
    bfloat16_is_fast,
    sparse_products_work,
)
from whisper_steer.activation_functions import BatchTopK, JumpReLU, ReLU, TopK, l1_loss, make
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder

VARIANTS = ("batchtopk", "matryoshka", "topk", "jumprelu", "relu")
# Matryoshka: the reconstruction from each of these shares of the latents counts equally
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Step:
    """What one step saw, per frame of its batch.

    Attributes:
        errors: (B,) squared error of z; z has mean squared norm 1, so with centring its mean is the fraction
            of variance unexplained.
        active: (B,) latents active in the frame.
    """

    errors: Tensor
    active: Tensor

    @property
    def error(self) -> float:
        return float(self.errors.mean())


@dataclass(frozen=True)
class Moments:
    """Sums over activations: number of frames, sum (d_model,) and sum of squared norms (), in float64."""

    frames: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of activations x (frames, d_model)."""
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        for chunk in x.split(10_000):  # bounds the memory of the float64 copy
            wide = chunk.double().cpu()
            total += wide.sum(dim=0)
            squares += wide.square().sum()
        return cls(len(x), total, squares)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.frames + other.frames, self.total + other.total, self.squares + other.squares)

    def over(self, collective: Collective) -> Moments:
        """Of all processes together."""
        return Moments(
            collective.count(self.frames), collective.sum(self.total), collective.sum(self.squares)
        )


class SAETrainer:
    """Trains one SAE.

    Attributes:
        sae: in the space of z; use `export` for the one to save.
        form: the training form of its activation function.
        mean, scale: of the layer's activations, set by `set_normalisation`.
        unused_frames: (n_latents,) frames seen since a latent was last active.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_latents: int,
        *,
        activation: str = "batchtopk",
        k: int | None = 50,
        lr: float = 2e-4,
        sparsity: float = 1.0,
        auxiliary: float = 0.0,
        dead_after: int = 1_000_000,
        seed: int = 0,
        sparse: bool | None = None,
        screen: bool | None = None,
        device: str | torch.device = "cpu",
        autocast: bool = False,
        collective: Collective = ALONE,
    ):
        """activation: one of VARIANTS. sparsity: weight of the sparsity loss of jumprelu (target k) and relu
        (L1). auxiliary: weight of the loss that revives dead latents (Gao et al. 2024, arXiv 2406.04093,
        take 1/32); 0 leaves it out, as AudioSAE does. dead_after: frames without activation after which a
        latent counts as dead. sparse: written-out sparse gradients (None: on a CPU); screen: candidates
        found in bfloat16 (see `LargestOfBatch`; None: where that is fast). autocast: products in bfloat16
        (CUDA). collective: the processes that share this SAE's gradients.

        Raises UsageError: an unknown variant, or one that lacks its k.
        """
        if activation not in VARIANTS:
            raise UsageError(f"activation is {activation!r}: expected one of {', '.join(VARIANTS)}")
        self.variant = activation
        form = "batchtopk" if activation == "matryoshka" else activation
        device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1009 + layer)
            self.sae = SparseAutoencoder(d_model, n_latents, activation=form, k=k, layer=layer)
        # JumpReLU's thresholds must live where pre-activations of a unit-norm input do, or no gradient
        # reaches them
        options: dict[str, Any] = {"initial_theta": 0.05, "bandwidth": 0.05} if form == "jumprelu" else {}
        self.form: BatchTopK | TopK | JumpReLU | ReLU = make(form, n_latents, k, **options)
        self.form.train().to(device)
        self.sae.to(device)
        self.layer, self.k, self.sparsity, self.seed = layer, k, sparsity, seed
        self.auxiliary, self.dead_after = auxiliary, dead_after
        self.collective, self.autocast = collective, autocast
        by_default = device.type == "cpu" and sparse_products_work()
        by_topk = isinstance(self.form, (BatchTopK, TopK))
        self.sparse = by_topk and (by_default if sparse is None else sparse)
        self.base_lr = lr
        parameters = [*self.sae.parameters(), *self.form.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), fused=True)
        self.mean = torch.zeros(d_model, device=device)
        self.scale = 1.0
        self.unused_frames = torch.zeros(n_latents, dtype=torch.int64, device=device)
        screen = bfloat16_is_fast() if screen is None else screen
        largest = LargestOfFrame if form == "topk" else LargestOfBatch
        self._choose: LargestOfBatch | LargestOfFrame = largest(k or 0, screen=screen)
        shares = PREFIXES if activation == "matryoshka" else (1.0,)
        self.prefixes = tuple(sorted({max(1, round(share * n_latents)) for share in shares}))

    def set_normalisation(self, x: Tensor, *, centre: bool) -> None:
        """Take mean and scale from activations x (frames, d_model); b_dec then starts at the mean of z,
        zero.
        """
        self.set_moments(Moments.of(x), centre=centre)

    def set_moments(self, moments: Moments, *, centre: bool) -> None:
        """As `set_normalisation`, from sums over frames."""
        mean = moments.total / moments.frames if centre else torch.zeros_like(moments.total)
        variance = moments.squares / moments.frames - mean.square().sum()
        self.mean = mean.float().to(self.mean.device)
        self.scale = float(variance.clamp_min(0).sqrt()) or 1.0

    def normalised(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.device).float() - self.mean) / self.scale

    @property
    def alive(self) -> float:
        """Share of latents that were active within the last `dead_after` frames."""
        return float((self.unused_frames < self.dead_after).float().mean())

    def step(self, x: Tensor, *, lr_factor: float = 1.0, sparsity_factor: float = 1.0) -> Step:
        """One optimiser step on activations x (frames, d_model)."""
        z = self.normalised(x)
        self.optimizer.zero_grad(set_to_none=True)
        taken = self._sparse_gradients(z) if self.sparse else self._dense_gradients(z, sparsity_factor)
        self._share_gradients()
        self._keep_gradient_tangential()
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * lr_factor
        self.optimizer.step()
        with torch.no_grad():
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
        return taken

    def _share_gradients(self) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        self.collective.mean_([gradient for gradient in gradients if gradient is not None])

    # ---------- autograd

    def _dense_gradients(self, z: Tensor, sparsity_factor: float) -> Step:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.autocast):
            pre = self.sae.pre_activations(z)
        pre = pre.float()
        codes = self._everyones_largest(pre) if self.collective.size > 1 else self.form(pre)
        errors = torch.zeros(len(z), device=z.device)
        reconstruction: Tensor = self.sae.b_dec
        begin = 0
        for end in self.prefixes:
            with torch.autocast(z.device.type, torch.bfloat16, enabled=self.autocast):
                part = codes[:, begin:end] @ self.sae.W_dec[begin:end]
            reconstruction = reconstruction + part.float()
            residual = reconstruction - z
            last = residual.square().sum(dim=1)
            errors = errors + last / len(self.prefixes)
            begin = end
        loss = errors.mean()
        if isinstance(self.form, JumpReLU):
            loss = loss + self.sparsity * sparsity_factor * self._target_loss(pre)
        elif isinstance(self.form, ReLU):
            loss = loss + self.sparsity * sparsity_factor * l1_loss(codes, self.sae.W_dec)
        active = codes.detach() > 0
        loss = loss + self._auxiliary_loss(z, residual.detach(), active.any(dim=0))
        loss.backward()
        return Step(last.detach(), active.sum(dim=1))

    def _everyones_largest(self, pre: Tensor) -> Tensor:
        """The form's codes where BatchTopK's batch is that of all processes."""
        if not isinstance(self.form, BatchTopK):
            return self.form(pre)
        with torch.no_grad():
            wanted = self.form.k * len(pre) * self.collective.size
            flat = pre.detach().reshape(-1)
            for hint in (0.7 * float(self.form.smallest_kept), 0.0):
                candidates = self.collective.joined(flat[flat > hint].cpu().numpy())
                if len(candidates) >= wanted:
                    break
            largest = np.partition(candidates, -wanted)[-wanted:] if len(candidates) > wanted else candidates
            smallest = torch.tensor(float(largest.min()) if len(largest) else 0.0, device=pre.device)
            self.form._track(smallest)
        return torch.where(pre >= smallest.clamp_min(1e-30), pre, torch.zeros((), device=pre.device))

    def _target_loss(self, pre: Tensor) -> Tensor:
        """(L0 / k - 1)^2 with L0 over all processes; without k, L0 itself."""
        if not isinstance(self.form, JumpReLU):
            raise TypeError("only JumpReLU has a target loss")
        l0 = self.form.l0_loss(pre)
        if self.k is None:
            return l0
        everyones = self.collective.sum(l0.detach()) / self.collective.size
        # the same gradient as of the square over everyone's frames; the mean over processes completes it
        return 2 * (everyones / self.k - 1) / self.k * l0

    # ---------- the same by hand, from the non-zero codes

    @torch.no_grad()
    def _sparse_gradients(self, z: Tensor) -> Step:
        """Loss and gradients as autograd's, from the non-zero codes alone.

        error = mean_i |x^_i - z_i|^2, g = d error / d x^ = 2 (x^ - z) / B. Then dW_dec = f^T g, db_dec =
        sum g, and for each non-zero code d pre = g_i . W_dec[j] (ReLU's slope is 1 there), dW_enc = (d
        pre)^T z, db_enc = sum. With Matryoshka's prefixes a group of latents gets the sum of the g of every
        prefix that it is in.
        """
        sae = self.sae
        codes = self._codes(z)
        groups = list(zip((0, *self.prefixes), self.prefixes, strict=False))
        parts = [codes.columns_between(*group) for group in groups] if len(groups) > 1 else [codes]
        reconstruction = sae.b_dec.expand_as(z)
        residuals = []
        for (begin, end), part in zip(groups, parts, strict=True):
            reconstruction = reconstruction + part.times(sae.W_dec[begin:end])
            residuals.append(reconstruction - z)
        W_dec_gradients: list[Tensor] = []
        W_enc_gradients: list[Tensor] = []
        sae.b_enc.grad = torch.zeros_like(sae.b_enc)
        g = torch.zeros_like(z)
        for (begin, end), part, residual in reversed(list(zip(groups, parts, residuals, strict=True))):
            g = g + residual * (2 / (len(z) * len(groups)))
            slopes = part.products(g, sae.W_dec[begin:end])
            turned = part.transposed()
            W_dec_gradients.insert(0, turned.times(g))
            W_enc_gradients.insert(0, turned.with_values(slopes[turned.order]).times(z))
            sae.b_enc.grad[begin:end].index_add_(0, part.columns, slopes)
        sae.W_dec.grad, sae.W_enc.grad = _joined(W_dec_gradients), _joined(W_enc_gradients)
        sae.b_dec.grad = g.sum(dim=0)
        active = torch.zeros(sae.n_latents, dtype=torch.bool, device=z.device)
        active[codes.columns] = True
        with torch.enable_grad():
            auxiliary = self._auxiliary_loss(z, residuals[-1], active)
        if auxiliary.requires_grad:
            auxiliary.backward()
        return Step(residuals[-1].square().sum(dim=1), codes.frames_active())

    def _codes(self, z: Tensor) -> SparseCodes:
        """The codes that the training form keeps, without those that are zero anyway."""
        if z.device.type != "cpu":
            return self._codes_by_form(z)
        if isinstance(self._choose, LargestOfFrame) or not isinstance(self.form, BatchTopK):
            return self._choose(z, self.sae.W_enc, self.sae.b_enc)
        codes = self._choose(z, self.sae.W_enc, self.sae.b_enc, self.collective)
        if len(codes.values) or self.collective.size > 1:
            # the training form's running mean, which it cannot update itself as its forward is bypassed
            weight = 1.0 if self.form.steps == 0 else 1 - self.form.momentum
            self.form.smallest_kept.lerp_(torch.tensor(self._choose.smallest), weight)
            self.form.steps += 1
        return codes

    def _codes_by_form(self, z: Tensor) -> SparseCodes:
        """The same from the training form itself: where choosing with numpy would mean copying."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.autocast):
            pre = self.sae.pre_activations(z)
        pre = pre.float()
        return SparseCodes.of(self._everyones_largest(pre) if self.collective.size > 1 else self.form(pre))

    # ---------- dead latents

    def _auxiliary_loss(self, z: Tensor, residual: Tensor, active: Tensor) -> Tensor:
        """Counts unused frames; the loss of reconstructing what is left of z, -residual, from dead latents.

        Gao et al. 2024 (arXiv 2406.04093, appendix A.2), normalised by the residual's energy, with one
        change: the dead latents' pre-activations enter without ReLU. Behind a ReLU a latent whose
        pre-activations are all negative would get no gradient, and that is what most dead latents are.
        """
        active = self.collective.any_(active)
        self.unused_frames += len(z) * self.collective.size
        self.unused_frames[active] = 0
        nothing = torch.zeros((), device=z.device)
        if self.auxiliary == 0:
            return nothing
        dead = (self.unused_frames >= self.dead_after).nonzero().squeeze(1)
        if len(dead) == 0:
            return nothing
        pre = z @ self.sae.W_enc[dead].T + self.sae.b_enc[dead]
        count = min(len(dead), max(1, self.sae.d_model // 2))
        values, columns = pre.topk(count, dim=1, sorted=False)
        codes = torch.zeros_like(pre).scatter(1, columns, values)
        left = residual.detach() + codes @ self.sae.W_dec[dead]
        energy = residual.square().sum(dim=1).mean().clamp_min(1e-8)
        return self.auxiliary * left.square().sum(dim=1).mean() / energy.detach()

    @torch.no_grad()
    def _keep_gradient_tangential(self) -> None:
        """Remove what would only change the decoder rows' lengths, which are put back to 1 after the step."""
        gradient, rows = self.sae.W_dec.grad, self.sae.W_dec
        if gradient is not None:
            gradient -= (gradient * rows).sum(dim=1, keepdim=True) * rows

    # ---------- results

    @torch.no_grad()
    def export(self) -> SparseAutoencoder:
        """The SAE on x itself, on the CPU, with the form's threshold, scale and mean folded in: same codes.

        Its metadata hold the normalisation that was folded (input_scale, input_mean) and, for Matryoshka,
        the prefixes.
        """
        sae = SparseAutoencoder(
            self.sae.d_model, self.sae.n_latents, activation=self.sae.activation, k=self.k, layer=self.layer
        )
        sae.load_state_dict(self.sae.state_dict())
        sae.theta.copy_(self.form.theta())
        sae = sae.fold_input_scale(self.scale).fold_mean(self.mean.cpu()).eval().requires_grad_(False)
        sae.metadata |= {
            "variant": self.variant,
            "input_scale": self.scale,
            "input_mean": [round(value, 6) for value in self.mean.tolist()],
        }
        if len(self.prefixes) > 1:
            sae.metadata["matryoshka_prefixes"] = list(self.prefixes)
        return sae

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= {f"form.{name}": value for name, value in self.form.state_dict().items()}
        tensors |= {
            "mean": self.mean,
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "smallest": torch.tensor(self._choose.smallest, dtype=torch.float64),
            "unused_frames": self.unused_frames,
        }
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in values.items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue where `state` was taken. Raises KeyError or RuntimeError where it does not fit."""

        def under(start: str) -> dict[str, Tensor]:
            return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}

        self.sae.load_state_dict(under("sae."))
        self.form.load_state_dict(under("form."))
        self.mean, self.scale = tensors["mean"].to(self.mean.device), float(tensors["scale"])
        self._choose.smallest = float(tensors["smallest"])
        self.unused_frames.copy_(tensors["unused_frames"])
        optimizer = self.optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in under("adam.").items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
