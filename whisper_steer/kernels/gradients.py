"""Gradients through the kernels: of the codes' values, and of the weights from the codes alone.

With codes c = W_enc x + b_enc at the places that were kept (elsewhere 0 with slope 0), g_c the values'
gradient and g that of the decoded frames:

    decode   d value = g[frame] . W_dec[latent]     dW_dec = codes^T g       db_dec = sum g
    encode   dx = g_c W_enc (rows of the codes)     dW_enc = g_c^T x         db_enc = g_c^T 1

The places themselves (threshold, largest k) have no gradient, as in every SAE trained that way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .codes import Codes

# (codes, left (frames, d), right (n, d)) -> shaped like the values; (codes, g (frames, d)) -> (n, d);
# (codes, W (n, d)) -> (frames, d)
Products = Callable[[Codes, Tensor, Tensor], Tensor]
WeightGradient = Callable[[Codes, Tensor], Tensor]
WeightedRows = Callable[[Codes, Tensor], Tensor]


class EncodedValues(torch.autograd.Function):
    """The values of codes that were found without autograd, as a function of x, W_enc and b_enc."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        codes: Codes,
        rows: WeightedRows,
        gradient: WeightGradient,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_enc)
        ctx.codes, ctx.rows, ctx.gradient = codes, rows, gradient
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_values: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc = ctx.saved_tensors
        # places without a code hold 0 and have slope 0
        slopes = torch.where(ctx.codes.values != 0, g_values, torch.zeros_like(g_values))
        codes = ctx.codes.with_values(slopes)
        for_x = for_W = for_b = None
        if ctx.needs_input_grad[0]:
            for_x = ctx.rows(codes, W_enc).reshape(x.shape).to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[1]:
            for_W = ctx.gradient(codes, flat).to(W_enc.dtype)
        if ctx.needs_input_grad[2]:
            ones = torch.ones(len(flat), 1, dtype=slopes.dtype, device=slopes.device)
            for_b = ctx.gradient(codes, ones).squeeze(1).to(b_enc.dtype)
        return for_x, for_W, for_b, None, None, None


class Decoded(torch.autograd.Function):
    """codes W_dec, (frames, d), as a function of the values and W_dec."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        codes: Codes,
        rows: WeightedRows,
        products: Products,
        gradient: WeightGradient,
    ) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.codes, ctx.products, ctx.gradient = codes, products, gradient
        return rows(codes.with_values(values), W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        g = g.contiguous()
        for_values = for_W = None
        if ctx.needs_input_grad[0]:
            for_values = ctx.products(ctx.codes, g, W_dec).to(values.dtype)
        if ctx.needs_input_grad[1]:
            for_W = ctx.gradient(ctx.codes.with_values(values), g).to(W_dec.dtype)
        return for_values, for_W, None, None, None, None
