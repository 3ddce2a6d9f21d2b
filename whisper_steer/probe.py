"""A Probe: a linear read-out of one encoder layer, frame by frame. Gates are sums of them over layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UsageError
from .plaindata import set_indices, set_int, set_tensor, subset_codes

PROBE_KINDS = ("latents", "raw")


@dataclass(frozen=True, eq=False)
class Probe:
    """One layer's share of the logit that *nobody* speaks in a frame.

    Features of a frame: kind "latents": log1p(f_j / unit_j) of m latents of an SAE, f by the threshold form
    (W_enc (m, d_model), b_enc, theta, unit (m,)); kind "raw": (x - mean) / std of the activation itself
    (mean, std (d_model,)). coef: one per feature. indices: the latents' numbers in the SAE.
    """

    layer: int
    kind: str
    coef: Tensor
    W_enc: Tensor | None = None
    b_enc: Tensor | None = None
    theta: Tensor | None = None
    unit: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        set_int(self, "layer", 0)
        if self.kind not in PROBE_KINDS:
            raise UsageError(f"probe has kind {self.kind!r}: expected one of {', '.join(PROBE_KINDS)}")
        set_tensor(self, "coef", (None,))
        m = self.coef.shape[0]
        needed = ("b_enc", "theta", "unit") if self.kind == "latents" else ("mean", "std")
        if self.kind == "latents":
            set_tensor(self, "W_enc", (m, None))
            set_indices(self, m)
        for name in needed:
            set_tensor(self, name, (m,))
        for name in ("unit", "std"):
            value = getattr(self, name)
            if name in needed and not bool((value > 0).all()):
                raise UsageError(f"probe has a {name} of {float(value.min())}: expected numbers > 0")

    @property
    def d_model(self) -> int:
        return self.coef.shape[0] if self.W_enc is None else self.W_enc.shape[1]

    def features(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., m), float32: what `coef` multiplies."""
        if self.kind == "latents":
            codes = subset_codes(x, _there(self.W_enc), _there(self.b_enc), _there(self.theta))
            return torch.log1p(codes / _there(self.unit).to(x.device))
        return (x.float() - _there(self.mean).to(x.device)) / _there(self.std).to(x.device)

    def logits(self, x: Tensor) -> Tensor:
        """(..., frames, d_model) -> (..., frames), float32, without an intercept."""
        return self.features(x) @ self.coef.to(x.device)


def _there(tensor: Tensor | None) -> Tensor:
    """Narrow a field that `__post_init__` has already required."""
    if tensor is None:
        raise UsageError("the probe lacks a tensor that its kind needs")
    return tensor
