"""The Gate: says how surely nobody speaks, so that edits spare speech and empty windows are withheld."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UsageError
from .plaindata import set_indices, set_int, set_number, set_tensor, subset_codes

GATE_KINDS = ("latents", "raw")
# a frame this surely spoken is not touched at all, so that clear speech stays bit-identical
MIN_FRAME_GATE = 0.01


@dataclass(frozen=True, eq=False)
class Gate:
    """A linear probe on one layer that says, per frame and per 30 s window, how surely *nobody* speaks.

    Features of a frame: kind "latents": log1p(f_j / unit_j) of m latents, f by the threshold form (W_enc (m,
    d_model), b_enc, theta, unit (m,)); kind "raw": (x - mean) / std (mean, std (d_model,)). coef: one per
    feature.

    smooth: width of the moving average over frames (odd; a frame is 20 ms). threshold: the window logit
    above which a window is withheld at alpha 1; spread: how much it rises towards small alphas. frame_scale,
    frame_bias: slope and centre of the per-frame gate. indices: the latents' numbers in the SAE.
    """

    layer: int
    coef: Tensor
    intercept: float
    W_enc: Tensor | None
    b_enc: Tensor | None
    theta: Tensor | None
    kind: str
    smooth: int
    threshold: float
    spread: float
    frame_scale: float
    frame_bias: float
    unit: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        set_int(self, "layer", 0)
        if self.kind not in GATE_KINDS:
            raise UsageError(f"gate has kind {self.kind!r}: expected one of {', '.join(GATE_KINDS)}")
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
                raise UsageError(f"gate has a {name} of {float(value.min())}: expected numbers > 0")
        for name in ("intercept", "threshold", "spread", "frame_scale", "frame_bias"):
            set_number(self, name)
        if self.spread < 0:
            raise UsageError(f"gate has spread {self.spread}: expected a number >= 0")
        set_int(self, "smooth", 1)
        if self.smooth % 2 == 0:
            raise UsageError(f"gate has smooth {self.smooth}: expected an odd number of frames")

    @property
    def d_model(self) -> int:
        return self.coef.shape[0] if self.W_enc is None else self.W_enc.shape[1]

    def features(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., m), float32: what `coef` multiplies."""
        if self.kind == "latents":
            codes = subset_codes(x, _there(self.W_enc), _there(self.b_enc), _there(self.theta))
            return torch.log1p(codes / _there(self.unit).to(x.device))
        return (x.float() - _there(self.mean).to(x.device)) / _there(self.std).to(x.device)

    def frame_logits(self, x: Tensor) -> Tensor:
        """(batch, frames, d_model) -> (batch, frames): smoothed logit that nobody speaks in the frame."""
        logits = self.features(x) @ self.coef.to(x.device) + self.intercept
        if self.smooth == 1 or logits.shape[-1] == 0:
            return logits
        # count_include_pad=False: at the edges the mean is over the frames that exist
        pooled = F.avg_pool1d(
            logits.unsqueeze(1), self.smooth, stride=1, padding=self.smooth // 2, count_include_pad=False
        )
        return pooled.squeeze(1)

    @staticmethod
    def window_logit(frame_logits: Tensor) -> Tensor:
        """(batch, frames) -> (batch,): the minimum, so the frame most like speech decides."""
        return frame_logits.amin(dim=-1)

    def frame_gate(self, frame_logits: Tensor) -> Tensor:
        """(batch, frames) -> (batch, frames) in [0, 1]: how much of an edit a frame gets; below 0.01 it is
        0."""
        g = torch.sigmoid(self.frame_scale * (frame_logits - self.frame_bias))
        return torch.where(g >= MIN_FRAME_GATE, g, torch.zeros_like(g))  # NaN also becomes 0

    def window_threshold(self, alpha: float) -> float:
        """Window logit above which the window's words are withheld; infinite at alpha 0."""
        if alpha <= 0:
            return math.inf
        return self.threshold + self.spread * (1 / alpha - 1)


def _there(tensor: Tensor | None) -> Tensor:
    """Narrow a field that `__post_init__` has already required."""
    if tensor is None:
        raise UsageError("the gate lacks a tensor that its kind needs")
    return tensor
