"""A WindowKernel: how surely nobody speaks in a window, by its likeness to windows whose answer is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError
from .plaindata import set_number, set_tensor

POOLS = 3  # of every layer: likely speech, mean of sound, spread of sound


@dataclass(frozen=True, eq=False)
class WindowKernel:
    """A kernel machine (radial basis functions, as of a support vector machine) on pooled layers.

    z = projection @ pooled - offset; logit = sum_i weights[i] exp(-gamma |z - landmarks[i]|^2) + linear . z
    + intercept, the logit that nobody speaks. Far from all landmarks only the linear part says something.
    layers: read, ascending. pooled: the pools of every layer as `gate.pooled_windows` has them, flattened,
    p = POOLS * len(layers) * d_model numbers. projection: (k, p); offset: (k,); landmarks: (n, k);
    weights: (n,). linear: (k,); None: there is none.
    """

    layers: tuple[int, ...]
    projection: Tensor
    offset: Tensor
    landmarks: Tensor
    weights: Tensor
    gamma: float
    intercept: float
    linear: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"window kernel reads layers {list(self.layers)}: expected some, ascending")
        set_tensor(self, "projection", (None, None))
        k, p = self.projection.shape
        if p % (POOLS * len(self.layers)):
            raise UsageError(
                f"window kernel has a projection of {p} numbers: expected a multiple of "
                f"{POOLS * len(self.layers)}, {POOLS} pools of {len(self.layers)} layers"
            )
        set_tensor(self, "offset", (k,))
        set_tensor(self, "landmarks", (None, k))
        set_tensor(self, "weights", (len(self.landmarks),))
        if self.linear is not None:
            set_tensor(self, "linear", (k,))
        set_number(self, "gamma")
        set_number(self, "intercept")
        if self.gamma <= 0:
            raise UsageError(f"window kernel has gamma {self.gamma}: expected a number > 0")

    @property
    def d_model(self) -> int:
        return self.projection.shape[1] // (POOLS * len(self.layers))

    def project(self, pooled: Tensor) -> Tensor:
        """(batch, POOLS * layers, d_model) -> (batch, k), float32."""
        flat = pooled.float().flatten(1)
        return flat @ self.projection.to(flat.device).T - self.offset.to(flat.device)

    def logits(self, pooled: Tensor) -> Tensor:
        """(batch, POOLS * layers, d_model) -> (batch,), float32."""
        z = self.project(pooled)
        # by differences: |z|^2 - 2 z.l + |l|^2 would lose what far-off windows have left
        distances = (z.unsqueeze(1) - self.landmarks.to(z.device)).square().sum(dim=-1)
        logits = torch.exp(-self.gamma * distances) @ self.weights.to(z.device) + self.intercept
        return logits if self.linear is None else logits + z @ self.linear.to(z.device)
