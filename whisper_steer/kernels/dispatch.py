"""From a choice to the function that was chosen. Tensors are on one device and fit each other: __init__
checked."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference, triton_launch
from .arguments import Change
from .choice import choose
from .codes import Codes


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, width: int | None, impl: str | None
) -> Codes:
    chosen = choose("encode", x.device, torch.promote_types(x.dtype, W_enc.dtype), impl=impl).implementation
    if chosen == "triton":
        return triton_launch.encode_threshold(x, W_enc, b_enc, theta, width=width)
    run = cpu.encode_threshold if chosen == "cpu" else reference.encode_threshold
    return run(x, W_enc, b_enc, theta)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, impl: str | None) -> Codes:
    chosen = choose("encode", x.device, torch.promote_types(x.dtype, W_enc.dtype), impl=impl).implementation
    run = {"triton": triton_launch.encode_topk, "cpu": cpu.encode_topk}.get(chosen, reference.encode_topk)
    return run(x, W_enc, b_enc, k)


def encode_subset(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, impl: str | None) -> Tensor:
    # on CUDA all m codes are written anyway, so that torch's product does as well as any
    chosen = choose("encode_subset", x.device, W_enc.dtype, impl=impl).implementation
    run = cpu.encode_subset if chosen == "cpu" else reference.encode_subset
    return run(x, W_enc, b_enc, theta)


def weighted_rows(codes: Codes, weights: Tensor, impl: str | None) -> Tensor:
    """(frames, d), in the weights' dtype."""
    chosen = choose("decode", weights.device, weights.dtype, density=codes.density, impl=impl).implementation
    if chosen == "triton":
        return triton_launch.decode(codes, weights)
    if chosen == "cpu":
        return cpu.weighted_rows(codes, weights)
    if chosen == "dense":
        return reference.dense_rows(codes, weights)
    return reference.decode(codes, weights).to(weights.dtype)


def edit(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    change: Change,
    gate: Tensor | None,
    impl: str | None,
) -> Tensor:
    chosen = choose("edit", x.device, x.dtype, impl=impl).implementation
    run = {"triton": triton_launch.edit, "cpu": cpu.edit}.get(chosen, reference.edit)
    return run(x, W_enc, b_enc, theta, W_dec, change, gate)


def products(codes: Codes, left: Tensor, right: Tensor, impl: str | None) -> Tensor:
    chosen = choose("products", right.device, right.dtype, density=codes.density, impl=impl).implementation
    if chosen == "dense":
        return reference.dense_products(codes, left, right)
    run = {"triton": triton_launch.products, "cpu": cpu.products}.get(chosen, reference.products)
    return run(codes, left, right)


def weight_gradient(codes: Codes, g: Tensor, deterministic: bool | None, impl: str | None) -> Tensor:
    chosen = choose("weight_gradient", g.device, g.dtype, density=codes.density, impl=impl).implementation
    if chosen == "triton":
        fixed = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
        return triton_launch.weight_gradient(codes, g, deterministic=fixed)
    # the others always add in the same order
    return cpu.weight_gradient(codes, g) if chosen == "cpu" else reference.weight_gradient(codes, g)
