"""Floating-point numbers as they lie in model files, bfloat16 (which numpy lacks) included."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import UsageError

BFLOAT16 = "bfloat16"
FLOATS = ("float32", "float16", BFLOAT16)


def storage(dtype: str) -> np.dtype[Any]:
    """numpy's type of the stored bytes, little-endian; bfloat16 as the u16 that holds its bits."""
    return np.dtype("uint16" if dtype == BFLOAT16 else dtype).newbyteorder("<")


def from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Floats as float32, integers as they are; a new, writable array of `shape`."""
    values = np.frombuffer(data, storage(dtype)).reshape(shape)
    if dtype == BFLOAT16:  # the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32) if dtype in FLOATS else values.copy()


def to_bytes(values: np.ndarray, dtype: str, name: str) -> bytes:
    """float32 values rounded to one of FLOATS. Raises UsageError, naming `name`, beyond the type's range."""
    if dtype == BFLOAT16:
        bits = values.astype("<f4").view("<u4")
        # to nearest, ties to even: half of the last kept bit, minus one if that bit is 0
        encoded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        seen: np.ndarray = (encoded.astype("<u4") << 16).view("<f4")
    else:
        with np.errstate(over="ignore"):
            encoded = seen = values.astype(storage(dtype))
    if not bool(np.isfinite(seen).all()):
        raise UsageError(f"{name} would leave the range of {dtype}: choose a smaller alpha")
    return encoded.tobytes()


def added(data: bytes, dtype: str, shape: tuple[int, ...], addition: np.ndarray, name: str) -> bytes:
    """The stored floats plus `addition` (of their shape), summed in float32 and rounded once.

    Raises UsageError, naming `name`: not a floating-point type, another shape, or beyond the type's range.
    """
    if dtype not in FLOATS:
        raise UsageError(f"{name} is {dtype}: only floating-point numbers can be added to")
    vector = np.asarray(addition, np.float32)
    if vector.shape != shape:
        raise UsageError(f"{name} has shape {shape}, what is added has {vector.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        total = from_bytes(data, dtype, shape) + vector
    return to_bytes(total, dtype, name)
