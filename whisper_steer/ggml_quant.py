"""ggml's tensor types: sizes of all that occur in Whisper files; f32, f16, q8_0 and q5_0 read and written,
bf16, q4_0, q4_1 and q5_1 read.

A quantised row is cut into blocks of 32 (k-types: 256) neighbouring values. q8_0: f16 scale d and 32 signed
bytes, value = d q. q5_0: f16 scale d, 32 fifth bits (u32), 16 bytes with the low four bits of value i and of
value i + 16; value = d (q - 16). q4_0: without the fifth bits, value = d (q - 8). q5_1 and q4_1: f16 scale d
and f16 minimum m, value = d q + m. Rounding as ggml's own reference quantisers do it
(ggml/src/ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import FormatError, UsageError

BLOCK = 32


@dataclass(frozen=True)
class GgmlType:
    """One tensor type: its number in the file, values per block and bytes per block."""

    name: str
    number: int
    block: int
    nbytes: int


TYPES = {
    kind.number: kind
    for kind in (
        GgmlType("f32", 0, 1, 4),
        GgmlType("f16", 1, 1, 2),
        GgmlType("q4_0", 2, BLOCK, 18),
        GgmlType("q4_1", 3, BLOCK, 20),
        GgmlType("q5_0", 6, BLOCK, 22),
        GgmlType("q5_1", 7, BLOCK, 24),
        GgmlType("q8_0", 8, BLOCK, 34),
        GgmlType("q8_1", 9, BLOCK, 36),
        GgmlType("q2_k", 10, 256, 84),
        GgmlType("q3_k", 11, 256, 110),
        GgmlType("q4_k", 12, 256, 144),
        GgmlType("q5_k", 13, 256, 176),
        GgmlType("q6_k", 14, 256, 210),
        GgmlType("bf16", 30, 1, 2),
    )
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}
WRITABLE = ("f32", "f16", "q8_0", "q5_0")
READABLE = (*WRITABLE, "q5_1", "q4_0", "q4_1", "bf16")

_Q8 = np.dtype([("d", "<f2"), ("q", "i1", (32,))])
_Q5 = np.dtype([("d", "<f2"), ("high", "<u4"), ("low", "u1", (16,))])
_BLOCKS = {
    "q8_0": _Q8,
    "q5_0": _Q5,
    "q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "<u4"), ("low", "u1", (16,))]),
    "q4_0": np.dtype([("d", "<f2"), ("low", "u1", (16,))]),
    "q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("low", "u1", (16,))]),
}


def encode(values: np.ndarray, kind: str) -> bytes:
    """float values, any shape, as a tensor of one of WRITABLE; blocks run along the last axis.

    Raises UsageError: another type, a last axis that is no multiple of 32 for q8_0 and q5_0, or values that
    f16 cannot hold.
    """
    flat = np.ascontiguousarray(values, np.float32)
    if kind == "f32":
        return flat.astype("<f4").tobytes()
    if kind == "f16":
        return _half(flat).tobytes()
    if kind not in WRITABLE:
        raise UsageError(f"tensor type {kind!r}: expected one of {', '.join(WRITABLE)}")
    if flat.shape[-1] % BLOCK:
        raise UsageError(f"{kind} needs rows of a multiple of {BLOCK} values, got rows of {flat.shape[-1]}")
    blocks = flat.reshape(-1, BLOCK)
    return (_encode_q8 if kind == "q8_0" else _encode_q5)(blocks).tobytes()


def decode(data: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's bytes as float32 of `shape`. Raises FormatError for a type that is not in READABLE."""
    if kind in ("f32", "f16"):
        return np.frombuffer(data, "<f4" if kind == "f32" else "<f2").reshape(shape).astype(np.float32)
    if kind == "bf16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if kind not in READABLE:
        raise FormatError(f"tensors of type {kind} cannot be read: expected {', '.join(READABLE)}")
    blocks = np.frombuffer(data, _BLOCKS[kind])
    fields = blocks.dtype.names or ()
    scale = blocks["d"].astype(np.float32)[:, None]
    if kind == "q8_0":
        return (blocks["q"].astype(np.float32) * scale).reshape(shape)
    codes = np.concatenate([blocks["low"] & 0xF, blocks["low"] >> 4], axis=1)
    if "high" in fields:
        fifth = (blocks["high"][:, None] >> np.arange(BLOCK, dtype=np.uint32)) & 1
        codes = codes | (fifth << 4).astype(np.uint8)
    values = codes.astype(np.float32)
    if "m" in fields:
        return (values * scale + blocks["m"].astype(np.float32)[:, None]).reshape(shape)
    return ((values - (16 if kind == "q5_0" else 8)) * scale).reshape(shape)


def _encode_q8(blocks: np.ndarray) -> np.ndarray:
    scale = (np.abs(blocks).max(axis=1) / np.float32(127)).astype(np.float32)
    scaled = blocks * _reciprocal(scale)[:, None]
    packed = np.zeros(len(blocks), _Q8)
    packed["d"] = _half(scale)
    # halves are rounded away from zero, as C's roundf does
    packed["q"] = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
    return packed


def _encode_q5(blocks: np.ndarray) -> np.ndarray:
    largest = np.abs(blocks).argmax(axis=1)  # the sign counts: that value becomes exactly -16 d
    scale = (np.take_along_axis(blocks, largest[:, None], axis=1)[:, 0] / np.float32(-16)).astype(np.float32)
    scaled = blocks * _reciprocal(scale)[:, None]
    codes = np.minimum((scaled + np.float32(16.5)).astype(np.int8), 31).astype(np.uint8)
    packed = np.zeros(len(blocks), _Q5)
    packed["d"] = _half(scale)
    packed["low"] = (codes[:, :16] & 0xF) | ((codes[:, 16:] & 0xF) << 4)
    packed["high"] = ((codes.astype(np.uint32) >> 4) << np.arange(BLOCK, dtype=np.uint32)).sum(
        axis=1, dtype=np.uint32
    )
    return packed


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale in float32, 0 where scale is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not bool(np.isfinite(halves).all()):
        raise UsageError("a value is beyond float16 (65504) or not finite: write f32 instead")
    return halves
