"""Helpers of the frozen dataclasses that hold tensors: check fields, move to a device, split for a file."""

from __future__ import annotations

import math
import numbers
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import kernels
from .errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Part = TypeVar("_Part", bound="DataclassInstance")


def subset_codes(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> Tensor:
    """Threshold-form codes of m latents, float32: x (..., d_model), W_enc (m, d_model) -> (..., m)."""
    return kernels.encode_subset(x, W_enc.to(x.device), b_enc.to(x.device), theta.to(x.device))


def moved(part: _Part, device: torch.device | str) -> _Part:
    """A copy of a part with its tensors on `device`."""
    tensors = {
        f.name: getattr(part, f.name) for f in fields(part) if isinstance(getattr(part, f.name), Tensor)
    }
    return replace(part, **{name: tensor.to(device) for name, tensor in tensors.items()})


def split(part: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the part's tensors into `tensors` under `prefix` and return its plain values."""
    plain = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, Tensor):
            tensors[prefix + f.name] = value
        elif value is not None:
            plain[f.name] = value
    return plain


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def set_tensor(part: Any, name: str, shape: tuple[int | None, ...]) -> None:
    """Make a field a float32 tensor of that shape (None: any size >= 1) or raise UsageError."""
    value, what = getattr(part, name), f"{type(part).__name__} has {name}"
    if value is None:
        raise UsageError(f"{type(part).__name__} lacks {name}")
    try:
        tensor = torch.as_tensor(value).detach().to(torch.float32, copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{what} of type {type(value).__name__}: expected a tensor of numbers") from error
    fits = len(shape) == tensor.ndim and all(
        s == t or (s is None and t > 0) for s, t in zip(shape, tensor.shape, strict=False)
    )
    if not fits:
        expected = tuple("any" if s is None else s for s in shape)
        raise UsageError(f"{what} of shape {tuple(tensor.shape)}: expected {expected}")
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError(f"{what} with NaN or infinity: expected finite numbers")
    object.__setattr__(part, name, tensor)


def set_indices(part: Any, m: int) -> None:
    indices = torch.as_tensor(part.indices).detach().to(torch.int64)
    if indices.numel() == 0:
        indices = torch.arange(m)
    if tuple(indices.shape) != (m,):
        raise UsageError(
            f"{type(part).__name__} has indices of shape {tuple(indices.shape)}: expected ({m},)"
        )
    object.__setattr__(part, "indices", indices)


def set_int(part: Any, name: str, least: int) -> None:
    """Make a field an int (numpy's are taken too) of at least `least` or raise UsageError."""
    value = getattr(part, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise UsageError(f"{type(part).__name__} has {name} {value!r}: expected a whole number >= {least}")
    object.__setattr__(part, name, int(value))


def set_number(part: Any, name: str) -> None:
    """Make a field a float (numpy's are taken too) or raise UsageError; NaN and infinity are refused."""
    value = getattr(part, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UsageError(f"{type(part).__name__} has {name} {value!r}: expected a finite number")
    object.__setattr__(part, name, float(value))
