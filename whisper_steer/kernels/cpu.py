"""The kernels on a CPU: blocks of frames whose pre-activations stay in the cache, and products over codes
alone.

Nothing is compiled at run time: torch's embedding_bag (a weighted sum of rows) decodes, its BLAS
multiplies, numpy finds the few codes among the pre-activations (several times as fast as torch's
nonzero).

Where a CPU multiplies bfloat16 in hardware, encoding by thresholds is screened: a product in bfloat16,
shifted by a bound on its error, finds every candidate; their pre-activations are then computed in
float32. What it can miss is nothing: with u = 2^-8 (half a unit in the last place), rounding x and w
changes their product by at most (2 u + u^2) |x||w|, summing it in float32 by d 2^-24 |x||w|. So pre >
theta implies product + c |x||w| > theta - b with c somewhat above 2 u, and that margin is one more column
of the product.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from . import reference
from .arguments import Change, working_dtype
from .codes import Codes

BLOCK_BYTES = 12 << 20  # of pre-activations at a time: they are read again at once, from the cache
SMALL_BLOCK_BYTES = 3 << 19  # of activations at a time, where m latents' codes are but a tenth of them
LEAST_ROWS, MOST_ROWS = 128, 2048
SCREEN_FRAMES = 512  # fewer frames do not pay for rounding the weights
SCREEN_SHARE = 0.05  # candidates among all latents beyond which the float32 product is as fast
MARGIN = 0.0083  # c: 2 u = 0.00781, its square, the sums, and the rounding of the margin itself
TINY = 1e-20  # lengths below which products could fall below bfloat16's normal numbers


def encode_subset(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> Tensor:
    """As reference.encode_subset, the threshold in place. m is small: there is nothing to cut into blocks."""
    dtype = working_dtype(x, W_enc)
    pre = torch.nn.functional.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))
    nothing = torch.zeros((), dtype=dtype)
    return torch.where(pre > _least(theta, dtype), pre, nothing, out=pre)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, *, screen: bool | None = None
) -> Codes:
    """As reference.encode_threshold. screen: find candidates in bfloat16 (None: where that is fast)."""
    dtype = working_dtype(x, W_enc)
    flat = x.reshape(-1, x.shape[-1])
    weights, bias, least = W_enc.to(dtype), b_enc.to(dtype), _least(theta, dtype)
    if screen is None:
        screen = len(flat) >= SCREEN_FRAMES and bfloat16_is_fast()
    screening = _Screen.make(flat, weights, bias, least) if screen and dtype == torch.float32 else None
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = _rows(len(weights) * torch.finfo(dtype).bits // 8)
    buffer = torch.empty(min(rows, len(flat)), len(weights), dtype=dtype)
    for begin in range(0, len(flat), rows):
        block = flat[begin : begin + rows].to(dtype)
        if screening is not None:
            candidates = screening.codes(block)
            if candidates is not None:
                found.append(candidates)
                continue
            screening = None
        pre = torch.addmm(bias, block, weights.T, out=buffer[: len(block)])
        found.append(_above(pre, least))
    return _joined(found, x, len(weights), dtype)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Codes:
    """As reference.encode_topk, a block of frames at a time."""
    dtype = working_dtype(x, W_enc)
    flat = x.reshape(-1, x.shape[-1])
    n = len(W_enc)
    weights, bias = W_enc.to(dtype), b_enc.to(dtype)
    values = torch.empty(len(flat), min(k, n), dtype=dtype)
    indices = torch.empty(len(flat), min(k, n), dtype=torch.int32)
    rows = _rows(n * torch.finfo(dtype).bits // 8)
    buffer = torch.empty(min(rows, len(flat)), n, dtype=dtype)
    for begin in range(0, len(flat), rows):
        part = slice(begin, begin + rows)
        block = flat[part].to(dtype)
        best = torch.addmm(bias, block, weights.T, out=buffer[: len(block)]).topk(
            min(k, n), dim=1, sorted=False
        )
        values[part], indices[part] = best.values, best.indices
    return Codes(values.relu_(), indices, n, tuple(x.shape[:-1]))


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """codes W_dec + b_dec, (frames, d): each frame the weighted sum of its codes' rows.

    Half-precision weights are summed in float32 and rounded once, to their own dtype.
    """
    out = weighted_rows(codes, W_dec)
    return out if b_dec is None else out.add_(b_dec.to(out.dtype))


def weighted_rows(codes: Codes, weights: Tensor) -> Tensor:
    """(frames, d), in the weights' dtype: the sum over a frame's codes of value x weights[index]."""
    if codes.values.numel() == 0 or weights.shape[1] == 0:
        return torch.zeros(codes.frames, weights.shape[1], dtype=weights.dtype)
    if weights.dtype == torch.float64 or codes.values.dtype == torch.float64:
        return _weighted_rows_float64(codes, weights.double())
    indices = codes.indices if codes.indices.dtype in (torch.int32, torch.int64) else codes.indices.int()
    values = codes.values.to(weights.dtype)
    if codes.offsets is None:
        return embedding_bag(indices, weights, per_sample_weights=values, mode="sum")
    return embedding_bag(
        indices, weights, codes.offsets.to(indices.dtype), per_sample_weights=values, mode="sum",
        include_last_offset=True,
    )  # fmt: skip


def _weighted_rows_float64(codes: Codes, weights: Tensor) -> Tensor:
    """torch's embedding_bag is slow in float64."""
    if sparse_products_work():
        return _matrix(codes, codes.values.double()) @ weights
    return reference.decode(codes, weights)


def edit(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    change: Change,
    gate: Tensor | None,
) -> Tensor:
    """As reference.edit, a block of frames at a time; of a gated block only the frames where g is above 0."""
    dtype = working_dtype(x, W_enc)
    flat = x.reshape(-1, x.shape[-1])
    gates = None if gate is None else gate.reshape(-1)
    out = torch.empty(flat.shape, dtype=x.dtype)
    work = _Edit(W_enc.to(dtype), b_enc.to(dtype), _least(theta, dtype), W_dec.to(dtype), change)
    for part in _blocks(len(flat), x.shape[-1]):
        block = flat[part]
        if gates is None:
            work.into(out[part], block, None)
            continue
        g = gates[part]
        open_ = g > 0
        count = int(open_.sum())
        if count == len(block):
            work.into(out[part], block, g)
            continue
        out[part] = block
        if count:
            chosen = open_.nonzero().squeeze(1)
            changed = torch.empty(count, block.shape[1], dtype=x.dtype)
            work.into(changed, block[chosen], g[chosen])
            out[part].index_copy_(0, chosen, changed)
    return out.reshape(x.shape)


class _Edit:
    """What the blocks of an edit share."""

    def __init__(self, W_enc: Tensor, b_enc: Tensor, least: Tensor, W_dec: Tensor, change: Change):
        self.W_enc, self.b_enc, self.least, self.W_dec, self.change = W_enc, b_enc, least, W_dec, change
        self.nothing = torch.zeros((), dtype=W_enc.dtype)
        # an addition without floor is one vector, whatever the codes
        self.vector = reference.difference(b_enc, change) @ W_dec if change.constant else None

    def into(self, out: Tensor, x: Tensor, g: Tensor | None) -> None:
        """Write the edited frames x (rows, d) to out (rows, d)."""
        wide = x.to(self.W_enc.dtype)
        gates = None if g is None else g.to(wide.dtype).unsqueeze(1)
        if self.vector is not None:
            added = self.vector if gates is None else gates * self.vector
            out.copy_(wide + added)
            return
        f = torch.addmm(self.b_enc, wide, self.W_enc.T)
        torch.where(f > self.least, f, self.nothing, out=f)
        difference = reference.difference(f, self.change)
        if gates is not None:
            difference.mul_(gates)
        if out.dtype == wide.dtype:
            torch.addmm(wide, difference, self.W_dec, out=out)
        else:
            out.copy_(torch.addmm(wide, difference, self.W_dec))


def products(codes: Codes, left: Tensor, right: Tensor) -> Tensor:
    """As reference.products."""
    dtype = working_dtype(left, right)
    if codes.values.numel() == 0 or not sparse_products_work():
        return reference.products(codes, left, right)
    places = _matrix(codes, torch.ones(codes.values.shape, dtype=dtype))
    sampled = torch.sparse.sampled_addmm(places, left.to(dtype), right.to(dtype).T, beta=0.0)
    return sampled.values().reshape(codes.values.shape)


def weight_gradient(codes: Codes, g: Tensor) -> Tensor:
    """As reference.weight_gradient; always summed in the same order: the frames', for each latent."""
    return weighted_rows(codes.transposed(), g.contiguous())


# ---------- what this CPU can do


@lru_cache(maxsize=1)
def sparse_products_work() -> bool:
    """Whether torch's sparse products run here (on a CPU they need MKL)."""
    with warnings.catch_warnings():
        # torch says once per process that CSR tensors are in beta
        warnings.simplefilter("ignore", UserWarning)
        try:
            offsets, columns = torch.tensor([0, 1]), torch.tensor([0])
            matrix = torch.sparse_csr_tensor(offsets, columns, torch.ones(1), (1, 1), check_invariants=False)
            torch.sparse.sampled_addmm(matrix, torch.ones(1, 1), torch.ones(1, 1), beta=0.0)
            return bool((matrix @ torch.ones(1, 1)).item() == 1)
        except RuntimeError:
            return False


@lru_cache(maxsize=1)
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is emulated, slower than float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return bool(supported or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


# ---------- blocks and codes


def _rows(bytes_per_row: int) -> int:
    return max(LEAST_ROWS, min(MOST_ROWS, BLOCK_BYTES // max(bytes_per_row, 1)))


def _blocks(frames: int, width: int) -> list[slice]:
    rows = max(LEAST_ROWS, SMALL_BLOCK_BYTES // (4 * max(width, 1)))
    return [slice(begin, min(begin + rows, frames)) for begin in range(0, frames, rows)]


def _least(theta: Tensor, dtype: torch.dtype) -> Tensor:
    """The value that a pre-activation must exceed to be a code: relu comes with the threshold."""
    return theta.to(dtype).clamp_min(0)


def _above(pre: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where pre (rows, n) exceeds `least` (n,): codes per row, their columns, their values."""
    flat = np.flatnonzero((pre > least).numpy())
    return _placed(torch.from_numpy(flat), pre.reshape(-1)[torch.from_numpy(flat)], pre.shape)


def _placed(flat: Tensor, values: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """From ascending flat positions in a matrix."""
    starts = torch.arange(shape[0] + 1) * shape[1]
    counts = torch.searchsorted(flat, starts).diff()
    return counts, (flat - torch.repeat_interleave(starts[:-1], counts)).int(), values


def _joined(found: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, n: int, dtype: torch.dtype) -> Codes:
    offsets = torch.zeros(x.shape[:-1].numel() + 1, dtype=torch.int64)
    if not found:
        return Codes(
            torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.int32), n, tuple(x.shape[:-1]), offsets
        )
    counts, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    offsets[1:] = counts.cumsum(0)
    return Codes(values, columns, n, tuple(x.shape[:-1]), offsets)


def _matrix(codes: Codes, values: Tensor) -> Tensor:
    """A torch CSR matrix (frames, n_latents) with these values at the codes' places."""
    offsets = codes.offsets
    if offsets is None:
        offsets = torch.arange(codes.frames + 1) * codes.values.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CSR tensors are in beta
        return torch.sparse_csr_tensor(
            offsets.long(), codes.indices.reshape(-1).long(), values.reshape(-1),
            (codes.frames, codes.n_latents), check_invariants=False,
        )  # fmt: skip


class _Screen:
    """The bfloat16 product that finds candidates; see the module's docstring."""

    def __init__(self, W_enc: Tensor, b_enc: Tensor, least: Tensor, centre: Tensor, lengths: Tensor):
        self.W_enc, self.b_enc, self.least, self.centre = W_enc, b_enc, least, centre
        d = W_enc.shape[1]
        # the margin's column, and zeros up to a width that the product likes
        self.padding = 32 - d % 32
        self.weights = torch.zeros(len(W_enc), d + self.padding, dtype=torch.bfloat16)
        self.weights[:, :d], self.weights[:, d] = W_enc, lengths
        bias = b_enc + W_enc @ centre - least
        # 1 % of itself is more than rounding it can take away
        self.bias = (bias + 0.01 * bias.abs()).bfloat16()

    @classmethod
    def make(cls, x: Tensor, W_enc: Tensor, b_enc: Tensor, least: Tensor) -> _Screen | None:
        """For activations x (frames, d); None where lengths are beyond what the error bound holds for."""
        # about the mean: a constant far from zero would only widen the margin
        centre = x[:: max(1, len(x) // 256)].float().mean(dim=0)
        lengths = W_enc.norm(dim=1)
        if not bool(
            (lengths > TINY).all() and torch.isfinite(lengths).all() and torch.isfinite(centre).all()
        ):
            return None
        return cls(W_enc, b_enc, least, centre, lengths)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `_above`, of x (rows, d) float32; None where it finds too many candidates or its bound fails."""
        centred = x - self.centre
        lengths = centred.norm(dim=1)
        if not bool(torch.isfinite(lengths).all()):
            return None
        rough_x = torch.zeros(len(x), x.shape[1] + self.padding, dtype=torch.bfloat16)
        rough_x[:, : x.shape[1]], rough_x[:, x.shape[1]] = centred, MARGIN * lengths.clamp_min(TINY)
        rough = linear(rough_x, self.weights, self.bias)
        # positive bfloat16 numbers have positive bits
        flat = torch.from_numpy(np.flatnonzero(rough.view(torch.int16).numpy() > 0))
        if len(flat) > SCREEN_SHARE * rough.numel():
            return None
        counts, columns, _ = _placed(flat, flat, rough.shape)
        offsets = torch.zeros(len(x) + 1, dtype=torch.int64)
        offsets[1:] = counts.cumsum(0)
        places = Codes(torch.ones(len(flat)), columns, len(self.W_enc), (len(x),), offsets)
        latents = columns.long()
        pre = products(places, x, self.W_enc) + self.b_enc[latents]
        keep = pre > self.least[latents]
        kept = torch.zeros(len(flat) + 1, dtype=torch.int64)
        kept[1:] = keep.cumsum(0)
        return kept[offsets].diff(), columns[keep], pre[keep]
