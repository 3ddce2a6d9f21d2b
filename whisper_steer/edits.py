"""Edits of the residual stream: Shift, LatentEdit and MeanAblation. Plain data with a pure `__call__`.

x is (..., frames, d_model), the output of `encoder.blocks[layer]` (0-based), in any float dtype; an edit is
computed in float32 and returned in x's dtype. alpha (>= 0) is the public dial, strength the calibrated number
that it multiplies; at alpha 0 every edit returns x itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import kernels
from .errors import UsageError
from .plaindata import set_indices, set_int, set_number, set_tensor, subset_codes
from .sae import SparseAutoencoder

LATENT_MODES = ("add", "scale", "clamp")


@dataclass(frozen=True, eq=False)
class Shift:
    """x + alpha * strength * direction, the same for every frame. direction: (d_model,)."""

    layer: int
    direction: Tensor
    strength: float

    def __post_init__(self) -> None:
        set_int(self, "layer", 0)
        set_tensor(self, "direction", (None,))
        set_number(self, "strength")

    @property
    def d_model(self) -> int:
        return self.direction.shape[0]

    def delta(self, x: Tensor, alpha: float) -> Tensor:
        """What is added to x, float32, (d_model,)."""
        return (alpha * self.strength) * self.direction.to(x.device)

    def __call__(self, x: Tensor, alpha: float) -> Tensor:
        return gated(self, x, alpha, None)


@dataclass(frozen=True, eq=False)
class LatentEdit:
    """Edits m of an SAE's latents and adds only the decoded difference: x' = x + sum_j (f'_j - f_j) W_dec[j].

    With a = alpha * strength:
      "add"    f' = f + a values, not below 0 if `floor`
      "scale"  f' = f max(1 + a (values - 1), 0): values 0 ablates at a = 1, values 2 doubles
      "clamp"  f' = f + min(a, 1) (values - f)
    reconstruct: the papers' form; the edit holds *all* latents and b_dec, and the decoded f' replaces x (the
    SAE's error is dropped, nothing is floored: `floor` is then always False).

    Shapes: W_enc, W_dec (m, d_model); b_enc, theta, values (m,); b_dec (d_model,); indices (m,) int64, the
    latents' numbers in the SAE (default 0..m-1).
    """

    layer: int
    W_enc: Tensor
    b_enc: Tensor
    theta: Tensor
    W_dec: Tensor
    mode: str
    values: Tensor
    strength: float
    floor: bool = True
    reconstruct: bool = False
    b_dec: Tensor | None = None
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        set_int(self, "layer", 0)
        set_tensor(self, "W_enc", (None, None))
        m, d = self.W_enc.shape
        for name, shape in (("b_enc", (m,)), ("theta", (m,)), ("W_dec", (m, d)), ("values", (m,))):
            set_tensor(self, name, shape)
        set_indices(self, m)
        if self.mode not in LATENT_MODES:
            raise UsageError(f"latent edit has mode {self.mode!r}: expected one of {', '.join(LATENT_MODES)}")
        set_number(self, "strength")
        if self.reconstruct:
            if self.b_dec is None:
                raise UsageError(
                    "a latent edit with reconstruct=True needs b_dec and every latent of the SAE"
                )
            object.__setattr__(self, "floor", False)
        if self.b_dec is not None:
            set_tensor(self, "b_dec", (d,))

    @classmethod
    def from_sae(
        cls,
        sae: SparseAutoencoder,
        indices: Sequence[int] | Tensor | None,
        values: Tensor,
        *,
        mode: str = "add",
        strength: float = 1.0,
        floor: bool = True,
        reconstruct: bool = False,
    ) -> LatentEdit:
        """Cut the rows of `indices` out of an SAE (None: all latents; `reconstruct` needs all of them).

        Raises UsageError for a "topk" SAE: its codes have no threshold form.
        """
        if sae.activation == "topk":
            raise UsageError(
                "a 'topk' SAE has no threshold form to edit by: train it with activation='batchtopk'"
            )
        if reconstruct and indices is not None:
            raise UsageError(
                "reconstruct=True replaces the activation and needs every latent: pass indices=None"
            )
        rows = torch.arange(sae.n_latents) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        outside = rows[(rows < 0) | (rows >= sae.n_latents)]
        if outside.numel():
            raise UsageError(f"there is no latent {int(outside[0])}: expected 0 to {sae.n_latents - 1}")
        return cls(
            layer=sae.layer,
            W_enc=sae.W_enc[rows],
            b_enc=sae.b_enc[rows],
            theta=sae.theta[rows],
            W_dec=sae.W_dec[rows],
            mode=mode,
            values=values,
            strength=strength,
            floor=floor,
            reconstruct=reconstruct,
            b_dec=sae.b_dec if reconstruct else None,
            indices=rows,
        )

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[1]

    def codes(self, x: Tensor) -> Tensor:
        """f: (..., d_model) -> (..., m), float32."""
        return subset_codes(x, self.W_enc, self.b_enc, self.theta)

    def edited_codes(self, f: Tensor, alpha: float) -> Tensor:
        """f -> f', (..., m)."""
        a, values = alpha * self.strength, self.values.to(f.device)
        if self.mode == "add":
            added = f + a * values
            return added.relu() if self.floor else added
        if self.mode == "scale":
            return f * (1 + a * (values - 1)).clamp_min(0)
        return f + min(a, 1.0) * (values - f)

    def change(self, alpha: float, device: torch.device | str = "cpu") -> kernels.Change:
        """The edit as the kernels take it."""
        return kernels.Change(self.mode, self.values.to(device), alpha * self.strength, self.floor)

    def delta(self, x: Tensor, alpha: float) -> Tensor:
        """What is added to x, float32, (..., d_model)."""
        if self.reconstruct and self.b_dec is not None:
            return self._reconstruction(x, alpha) - x.float()
        return kernels.difference(self.codes(x), self.change(alpha, x.device)) @ self.W_dec.to(x.device)

    def edited(self, x: Tensor, alpha: float, g: Tensor | None) -> Tensor:
        """x + g (x' - x) in x's dtype, without `reconstruct`; g (...) or None."""
        device, gate = x.device, None if g is None else g.expand(x.shape[:-1])
        encoder = self.W_enc.to(device), self.b_enc.to(device), self.theta.to(device)
        return kernels.edit(x, *encoder, self.W_dec.to(device), self.change(alpha, device), gate=gate)

    def _reconstruction(self, x: Tensor, alpha: float) -> Tensor:
        """The decoded f', (..., d_model) float32. Each mode makes f' = factor f + constant, so that only the
        latents that are active have to be decoded."""
        a, values = alpha * self.strength, self.values
        factor = constant = torch.zeros_like(values)
        if self.mode == "add":
            factor, constant = torch.ones_like(values), a * values
        elif self.mode == "scale":
            factor = (1 + a * (values - 1)).clamp_min(0)
        else:
            factor, constant = torch.full_like(values, 1 - min(a, 1.0)), min(a, 1.0) * values
        W_enc, b_enc, theta, W_dec, b_dec, factor, constant = (
            _there(part).to(x.device)
            for part in (self.W_enc, self.b_enc, self.theta, self.W_dec, self.b_dec, factor, constant)
        )
        bias = b_dec + constant @ W_dec
        if torch.compiler.is_compiling():  # sparse codes have as many values as the data says
            return (kernels.encode_subset(x, W_enc, b_enc, theta) * factor) @ W_dec + bias
        codes = kernels.encode(x.float(), W_enc, b_enc, theta=theta)
        return kernels.decode(codes.with_values(codes.values * factor[codes.indices.long()]), W_dec, bias)

    def __call__(self, x: Tensor, alpha: float) -> Tensor:
        return gated(self, x, alpha, None)


@dataclass(frozen=True, eq=False)
class MeanAblation:
    """x + a (mean - x), a = min(alpha * strength, 1): a frame becomes what it is on average where nobody
    speaks and nothing sounds (the mean ablation of interpretability, its data being the silence of padding).

    mean: (frames, d_model), one mean per position of the window, or (1, d_model). A frame that is within
    `tolerance` (in units of the mean's length) of its mean is silent already and left as it is, bit for bit.
    """

    layer: int
    mean: Tensor
    strength: float = 1.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        set_int(self, "layer", 0)
        set_tensor(self, "mean", (None, None))
        for name in ("strength", "tolerance"):
            set_number(self, name)
            if getattr(self, name) < 0:
                raise UsageError(f"mean ablation has {name} {getattr(self, name)}: expected a number >= 0")

    @property
    def d_model(self) -> int:
        return self.mean.shape[1]

    def delta(self, x: Tensor, alpha: float) -> Tensor:
        """What is added to x, float32, (..., frames, d_model). Raises UsageError for a window of more frames
        than it has means."""
        frames = x.shape[-2]
        if 1 < len(self.mean) < frames:
            raise UsageError(
                f"the mean ablation has means of {len(self.mean)} frames, the window has {frames}: "
                "expected at most as many"
            )
        mean = self.mean.to(x.device)
        if len(mean) > 1:
            mean = mean[:frames]
        away = mean - x.float()
        far = away.norm(dim=-1, keepdim=True) > self.tolerance * mean.norm(dim=-1, keepdim=True)
        return min(alpha * self.strength, 1.0) * torch.where(far, away, torch.zeros_like(away))

    def __call__(self, x: Tensor, alpha: float) -> Tensor:
        return gated(self, x, alpha, None)


Edit = Shift | LatentEdit | MeanAblation


def gated(edit: Edit, x: Tensor, alpha: float, g: Tensor | None) -> Tensor:
    """x + g (x' - x) with g (..., frames) in [0, 1]; bit for bit x where g is 0. g None: the whole edit."""
    if alpha == 0:
        return x
    # only on the CPU: elsewhere the question itself would make the device wait
    asked = g is not None and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if asked and g is not None and not bool((g > 0).any()):
        return x
    if isinstance(edit, LatentEdit) and not edit.reconstruct:
        return edit.edited(x, alpha, g)
    if g is None:
        return (x.float() + edit.delta(x, alpha)).to(x.dtype)
    active = (g > 0).unsqueeze(-1)
    changed = (x.float() + g.unsqueeze(-1).float() * edit.delta(x, alpha)).to(x.dtype)
    return torch.where(active, changed, x)


def _there(tensor: Tensor | None) -> Tensor:
    """Narrow a field that `__post_init__` has already required."""
    if tensor is None:
        raise UsageError("the latent edit lacks a tensor that its form needs")
    return tensor
