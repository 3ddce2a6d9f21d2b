"""Gradients through encode and decode: against finite differences, and against autograd through the dense
form."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import random_case

from whisper_steer import kernels

IMPLEMENTATIONS = ("cpu", "reference")


def small():
    return random_case(frames=4, d=5, n=9, seed=2).to(torch.float64)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", [{"k": 3}, {"theta": None}])
def test_gradcheck(impl, rule):
    case = small()
    rule = {"theta": case.theta} if "theta" in rule else rule

    def reconstruct(x, W_enc, b_enc, W_dec, b_dec):
        codes = kernels.encode(x, W_enc, b_enc, impl=impl, **rule)
        return kernels.decode(codes, W_dec, b_dec, impl=impl), codes.values

    parts = (case.x, case.W_enc, case.b_enc, case.W_dec, case.b_dec)
    assert torch.autograd.gradcheck(reconstruct, [part.clone().requires_grad_() for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_a_training_loss_has_the_dense_gradients(rule, dtype):
    case = random_case(frames=50).to(dtype)

    def parameters():
        return [part.clone().requires_grad_() for part in (case.W_enc, case.b_enc, case.W_dec, case.b_dec)]

    W_enc, b_enc, W_dec, b_dec = sparse = parameters()
    chosen = {"k": 5} if rule == "topk" else {"theta": case.theta}
    codes = kernels.encode(case.x, W_enc, b_enc, **chosen)
    out = kernels.decode(codes, W_dec, b_dec)
    (out.float() - case.x.float()).square().mean().backward()

    V_enc, a_enc, V_dec, a_dec = dense = [p.detach().float().requires_grad_() for p in sparse]
    kept = codes.dense().detach() != 0
    pre = case.x.float() @ V_enc.T + a_enc
    full = torch.where(kept, pre, 0.0)
    (full @ V_dec + a_dec - case.x.float()).square().mean().backward()
    for found, expected in zip(sparse, dense, strict=True):
        assert found.grad.dtype == dtype and expected.grad.abs().max() > 0
        most = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((found.grad.float() - expected.grad).norm() / expected.grad.norm()) < most


def test_gradients_are_the_same_every_time():
    case = random_case(frames=200, n=30)
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=6)
    first = kernels.weight_gradient(codes, case.x)
    assert all(torch.equal(kernels.weight_gradient(codes, case.x), first) for _ in range(3))


def test_only_wanted_gradients_are_made():
    case = random_case()
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=5)
    assert not codes.values.requires_grad
    W_dec = case.W_dec.clone().requires_grad_()
    kernels.decode(codes, W_dec).sum().backward()
    torch.testing.assert_close(W_dec.grad, codes.dense().sum(0)[:, None].expand(70, 48))
    b_dec = case.b_dec.clone().requires_grad_()
    kernels.decode(codes, case.W_dec, b_dec).sum().backward()
    assert b_dec.grad.tolist() == [18.0] * 48


def test_an_edit_is_differentiable():
    case = small()
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    change = kernels.Change("scale", torch.zeros(9, dtype=torch.float64), 0.5)
    gate = torch.tensor([0.0, 1.0, 0.5, 0.2], dtype=torch.float64)

    def edited(x):
        return kernels.edit(x, *rows, change, gate=gate)

    assert torch.autograd.gradcheck(edited, [case.x.clone().requires_grad_()])
