"""Sparse encode, decode and edit: one interface over three implementations.

    codes = encode(x, W_enc, b_enc, theta=theta)      # or k=50: Codes, never the (frames, n_latents) matrix
    x_hat = decode(codes, W_dec, b_dec)
    f = encode_subset(x, W_enc[rows], b_enc[rows], theta[rows])
    x_new = edit(x, W_enc[rows], b_enc[rows], theta[rows], W_dec[rows], Change("scale", zeros, 1.0), gate=g)

reference.py: plain torch, any device. cpu.py: blocks that stay in the cache, sums over codes alone.
triton_kernels.py (launched by triton_launch.py): CUDA. choice.py says which runs and why; `impl=` in a
call, or WHISPER_STEER_KERNELS in the environment, overrules it.

W_enc and W_dec are (n_latents, d_model), b_enc and theta (n_latents,), x (..., d_model) in any float
dtype. Half precision is accumulated in float32. Values, W_enc, b_enc, x, W_dec and b_dec get gradients
(gradients.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..errors import UsageError
from . import dispatch, reference
from .arguments import MODES, Change, check_gate, check_vector, check_width
from .choice import IMPLEMENTATIONS, Choice, choose, measure_break_even
from .codes import Codes
from .gradients import Decoded, EncodedValues
from .reference import difference

__all__ = [
    "IMPLEMENTATIONS", "MODES", "Change", "Choice", "Codes", "choose", "decode", "difference", "edit",
    "encode", "encode_subset", "measure_break_even", "products", "weight_gradient",
]  # fmt: skip


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    theta: Tensor | None = None,
    k: int | None = None,
    width: int | None = None,
    deterministic: bool | None = None,
    impl: str | None = None,
) -> Codes:
    """Codes of x (..., d_model), values float32 (float64 from float64).

    theta: relu(pre) where pre > theta (BatchTopK's inference form, JumpReLU; zeros for ReLU). k: the k
    largest of each frame, relu'd (TopK). width: places per frame of the padded layout that CUDA writes
    with theta; None: as many as needed, for which the device is waited for once. CPU and reference write
    CSR then and need none. deterministic: of the gradients on CUDA (None: as
    torch.use_deterministic_algorithms says).

    Raises UsageError: shapes that do not fit; not exactly one of theta and k; k or width below 1.
    """
    check_width(x, W_enc)
    check_vector("b_enc", b_enc, len(W_enc))
    check_vector("theta", theta, len(W_enc))
    if (theta is None) == (k is None):
        raise UsageError("encode needs either theta or k, one of the two")
    for name, number in (("k", k), ("width", width)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}: expected a whole number >= 1")
    if impl == "reference":
        return _encode(x, W_enc, b_enc, theta, k, width, impl)
    with torch.no_grad():
        codes = _encode(x, W_enc, b_enc, theta, k, width, impl)
    if not _has_gradient(x, W_enc, b_enc):
        return codes
    rows = partial(dispatch.weighted_rows, impl=impl)
    gradient = partial(dispatch.weight_gradient, deterministic=deterministic, impl=impl)
    return codes.with_values(EncodedValues.apply(x, W_enc, b_enc, codes, rows, gradient))


def _encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor | None,
    k: int | None,
    width: int | None,
    impl: str | None,
) -> Codes:
    if theta is not None:
        return dispatch.encode_threshold(x, W_enc, b_enc, theta, width, impl)
    return dispatch.encode_topk(x, W_enc, b_enc, int(k or 0), impl)


def encode_subset(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, *, impl: str | None = None
) -> Tensor:
    """Codes of m latents alone, dense: x (..., d_model), W_enc (m, d_model) -> (..., m) float32 (float64).

    Costs 2 d m operations a frame. Raises UsageError: shapes that do not fit.
    """
    check_width(x, W_enc)
    check_vector("b_enc", b_enc, len(W_enc))
    check_vector("theta", theta, len(W_enc))
    if impl == "reference" or torch.compiler.is_compiling() or _has_gradient(x, W_enc, b_enc):
        return reference.encode_subset(x, W_enc, b_enc, theta)
    return dispatch.encode_subset(x, W_enc, b_enc, theta, impl)


def decode(
    codes: Codes,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    deterministic: bool | None = None,
    impl: str | None = None,
) -> Tensor:
    """sum over a frame's codes of value W_dec[latent], + b_dec: (*codes.lead, d_model) in W_dec's dtype.

    Raises UsageError: W_dec has another number of latents, b_dec another width.
    """
    if W_dec.ndim != 2 or len(W_dec) != codes.n_latents:
        raise UsageError(f"W_dec has shape {tuple(W_dec.shape)}: expected ({codes.n_latents}, d_model)")
    check_vector("b_dec", b_dec, W_dec.shape[1])
    if impl == "reference" or not _has_gradient(codes.values, W_dec):
        found = dispatch.weighted_rows(codes, W_dec, impl)
    else:
        found = Decoded.apply(
            codes.values, W_dec, codes.with_values(codes.values.detach()),
            partial(dispatch.weighted_rows, impl=impl), partial(dispatch.products, impl=impl),
            partial(dispatch.weight_gradient, deterministic=deterministic, impl=impl),
        )  # fmt: skip
    if b_dec is not None:
        found = (
            found + b_dec.to(found.dtype)
            if _has_gradient(found, b_dec)
            else found.add_(b_dec.to(found.dtype))
        )
    return found.reshape(*codes.lead, W_dec.shape[1])


def edit(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    change: Change,
    *,
    gate: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x + g sum_j (f'_j - f_j) W_dec[j] over m latents, in x's dtype, computed in float32 (float64).

    x (..., d_model); W_enc, W_dec (m, d_model); b_enc, theta (m,); gate (...) in [0, 1], None: 1
    everywhere. Bit for bit x where the gate is 0. Inside torch.compile it is one operator; in a CUDA
    graph `change.amount` is part of the recording.

    Raises UsageError: shapes that do not fit.
    """
    check_width(x, W_enc)
    check_width(x, W_dec)
    for name, vector in (("b_enc", b_enc), ("theta", theta), ("values", change.values)):
        check_vector(name, vector, len(W_enc))
    check_gate(gate, x)
    if impl == "reference" or _has_gradient(x, W_enc, b_enc, W_dec, change.values, gate):
        return reference.edit(x, W_enc, b_enc, theta, W_dec, change, gate)
    if torch.compiler.is_compiling():
        operator = torch.ops.whisper_steer.edit
        found: Tensor = operator(
            x,
            W_enc,
            b_enc,
            theta,
            W_dec,
            change.values,
            gate,
            change.mode,
            float(change.amount),
            change.floor,
        )
        return found
    return dispatch.edit(x, W_enc, b_enc, theta, W_dec, change, gate, impl)


def products(codes: Codes, left: Tensor, right: Tensor, *, impl: str | None = None) -> Tensor:
    """left[frame] . right[latent] at every place of the codes, shaped like their values: left (frames,
    d), right (n_latents, d). The gradient of decode's values."""
    return dispatch.products(codes, left, right, impl)


def weight_gradient(
    codes: Codes, g: Tensor, *, deterministic: bool | None = None, impl: str | None = None
) -> Tensor:
    """codes^T g, (n_latents, d), for g (frames, d): the gradient of W_dec, and of W_enc from the values'
    gradients.

    deterministic: on CUDA, sums in the frames' order instead of atomic additions (None: as
    torch.use_deterministic_algorithms says); elsewhere the order is always the same.
    """
    return dispatch.weight_gradient(codes, g, deterministic, impl)


def _has_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


from . import compiled as _compiled  # noqa: E402, F401  registers the operator that `edit` names
