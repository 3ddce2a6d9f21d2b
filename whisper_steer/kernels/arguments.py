"""Checks of what the kernels are given: one clear line instead of an error from deep inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError

MODES = ("add", "scale", "clamp")


@dataclass(frozen=True, eq=False)
class Change:
    """What an edit does to the codes f of m latents: f -> f'. amount is alpha x strength, values (m,).

    "add": f' = f + amount values, not below 0 with `floor`; "scale": f' = f max(1 + amount (values - 1), 0);
    "clamp": f' = f + min(amount, 1) (values - f).
    """

    mode: str
    values: Tensor
    amount: float
    floor: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"an edit has mode {self.mode!r}: expected one of {', '.join(MODES)}")

    @property
    def constant(self) -> bool:
        """Is f' - f the same for every frame, whatever f is?"""
        return self.mode == "add" and not self.floor

    def factor(self) -> Tensor:
        """Mode "scale": what f is multiplied with, (m,)."""
        return (1 + self.amount * (self.values - 1)).clamp_min(0)


def check_width(x: Tensor, W: Tensor) -> None:
    """Raises UsageError unless x is (..., d) for W (n, d)."""
    if W.ndim != 2 or x.ndim < 1 or x.shape[-1] != W.shape[1]:
        raise UsageError(f"activations have shape {tuple(x.shape)}: expected (..., {W.shape[-1]})")


def check_vector(name: str, vector: Tensor | None, size: int) -> None:
    """Raises UsageError unless the vector is None or (size,)."""
    if vector is not None and tuple(vector.shape) != (size,):
        raise UsageError(f"{name} has shape {tuple(vector.shape)}: expected ({size},)")


def check_gate(gate: Tensor | None, x: Tensor) -> None:
    """Raises UsageError unless there is one gate value for every frame of x."""
    if gate is not None and gate.shape != x.shape[:-1]:
        raise UsageError(
            f"gate has shape {tuple(gate.shape)}: expected one value a frame, {tuple(x.shape[:-1])}"
        )


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, in which half precision is accumulated; float64 where any of the tensors is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
