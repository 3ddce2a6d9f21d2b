"""The kernels in plain torch: every device, every float dtype, autograd through all of them. What others are
tested against, and what runs where no other is at hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .arguments import Change, working_dtype
from .codes import Codes


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """W_enc x + b_enc in float32 (float64): (..., d) -> (..., n)."""
    dtype = working_dtype(x, W_enc)
    return linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))


def encode_subset(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> Tensor:
    """f = relu(pre) where pre > theta, else 0: (..., d) -> (..., m)."""
    pre = pre_activations(x, W_enc, b_enc)
    return torch.where(
        pre > theta.to(pre.dtype), pre.relu(), torch.zeros((), dtype=pre.dtype, device=pre.device)
    )


def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> Codes:
    return Codes.of(encode_subset(x, W_enc, b_enc, theta))


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Codes:
    """The k largest of each frame, relu'd."""
    pre = pre_activations(x, W_enc, b_enc).relu()
    values, indices = pre.reshape(-1, pre.shape[-1]).topk(min(k, pre.shape[-1]), dim=1, sorted=False)
    return Codes(values, indices.int(), pre.shape[-1], tuple(pre.shape[:-1]))


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """codes W_dec, (frames, d), in the working dtype."""
    dtype = working_dtype(codes.values, W_dec)
    return codes.with_values(codes.values.to(dtype)).dense().reshape(-1, codes.n_latents) @ W_dec.to(dtype)


def dense_rows(codes: Codes, weights: Tensor) -> Tensor:
    """As `decode`, multiplied in the weights' own dtype: what is faster where many latents are codes."""
    return codes.with_values(codes.values.to(weights.dtype)).dense().reshape(-1, codes.n_latents) @ weights


def dense_products(codes: Codes, left: Tensor, right: Tensor) -> Tensor:
    """As `products`: every product, of which those at the codes' places are kept."""
    everything = left.to(right.dtype) @ right.T
    return everything[codes.rows(), codes.indices.long()]


def difference(f: Tensor, change: Change) -> Tensor:
    """f' - f, (..., m). Written so that nothing cancels: relu(f + a v) - f is max(a v, -f)."""
    values = change.values.to(f)
    if change.mode == "add":
        added = change.amount * values
        return torch.maximum(added, -f) if change.floor else added.expand_as(f)
    if change.mode == "scale":
        return f * ((1 + change.amount * (values - 1)).clamp_min(0) - 1)
    return min(change.amount, 1.0) * (values - f)


def delta(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, W_dec: Tensor, change: Change) -> Tensor:
    """sum_j (f'_j - f_j) W_dec[j], in the working dtype: (..., d)."""
    f = encode_subset(x, W_enc, b_enc, theta)
    return difference(f, change) @ W_dec.to(f.dtype)


def edit(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    change: Change,
    gate: Tensor | None,
) -> Tensor:
    """x + g sum_j (f'_j - f_j) W_dec[j] in x's dtype; bit for bit x where g is 0."""
    added = delta(x, W_enc, b_enc, theta, W_dec, change)
    if gate is None:
        return (x.to(added.dtype) + added).to(x.dtype)
    changed = (x.to(added.dtype) + gate.unsqueeze(-1).to(added.dtype) * added).to(x.dtype)
    return torch.where((gate > 0).unsqueeze(-1), changed, x)


def products(codes: Codes, left: Tensor, right: Tensor) -> Tensor:
    """left[frame] . right[latent] for every place, shaped like the values: left (frames, d), right (n, d)."""
    dtype = working_dtype(left, right)
    rows, columns = codes.rows().reshape(-1), codes.indices.reshape(-1).long()
    found = torch.empty(len(columns), dtype=dtype, device=left.device)
    step = max(1, (1 << 22) // max(left.shape[1], 1))  # bounds the two gathered matrices
    for begin in range(0, len(columns), step):
        part = slice(begin, begin + step)
        found[part] = (left[rows[part]].to(dtype) * right[columns[part]].to(dtype)).sum(dim=1)
    return found.reshape(codes.values.shape)


def weight_gradient(codes: Codes, g: Tensor) -> Tensor:
    """codes^T g, (n_latents, d): what a weight's rows get from frames' gradients g (frames, d)."""
    dtype = working_dtype(codes.values, g)
    return codes.with_values(codes.values.to(dtype)).dense().reshape(-1, codes.n_latents).T @ g.to(dtype)
