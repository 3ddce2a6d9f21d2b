"""More of the Triton kernels in the interpreter: what a GPU would meet first. Run with TRITON_INTERPRET=1, by
test_kernels_triton.py in a process of its own."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from kernel_cases import adversarial, dense_codes, error, random_case

from whisper_steer import kernels
from whisper_steer.kernels import Change, triton_launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: see test_kernels_triton.py"
)


def test_an_outlier_dimension():
    """3e4 in one dimension of every frame: float32 keeps 1e-6 of the result only without tf32."""
    case = adversarial(2, 20, 24)["outlier dimension"]
    exact = case.to(torch.float64)
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, theta=case.theta, impl="triton")
    expected, unsure = dense_codes(case)
    assert error(codes.dense().masked_fill(unsure, 0), expected.masked_fill(unsure, 0)) < 1e-6
    rows = [getattr(exact, name) for name in ("W_enc", "b_enc", "theta", "W_dec")]
    change = Change("scale", torch.zeros(24), 1.0)
    found = kernels.edit(case.x, *(row.float() for row in rows), change, impl="triton")
    assert error(found, kernels.edit(exact.x, *rows, change, impl="reference")) < 1e-6


def test_an_edit_in_float16_does_not_overflow():
    """Differences of 80,000 are beyond float16, what they add to x is not."""
    W_enc, W_dec = torch.full((2, 4), 100.0).half(), torch.tensor([[1e-3] * 4, [0.0] * 4]).half()
    x = torch.tensor([[200.0] * 4, [1e-4] * 4, [-1.0] * 4]).half()
    rows = (W_enc, torch.zeros(2).half(), torch.zeros(2).half(), W_dec)
    change = Change("scale", torch.zeros(2), 1.0)
    found = kernels.edit(x, *rows, change, impl="triton")
    expected = kernels.edit(x.double(), *(r.double() for r in rows), change, impl="reference")
    assert found.dtype == torch.float16 and error(found, expected) < 1e-3
    assert float(expected[0, 0]) == pytest.approx(200 - 80, rel=1e-3)
    assert torch.equal(found[2], x[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_edit_of_half_activations_by_float32_rows(dtype):
    case = random_case(frames=5, d=24, n=20)
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    change, x = Change("clamp", case.theta, 0.7), case.x.to(dtype)
    gate = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.25])
    found = kernels.edit(x, *rows, change, gate=gate, impl="triton")
    exact = [r.double() for r in rows]
    expected = kernels.edit(
        x.double(), *exact, replace(change, values=change.values.double()), gate=gate, impl="reference"
    )
    assert error(found, expected) < 1e-2 and torch.equal(found[[0, 3]], x[[0, 3]])


def test_non_contiguous_input():
    case = random_case(frames=12, d=24, n=40)
    x, W_enc, W_dec = case.x.T.contiguous().T[::2, ::2], case.W_enc[:, ::2], case.W_dec[:, ::2]
    assert not (x.is_contiguous() or W_enc.is_contiguous())
    results = []
    for impl in ("triton", "reference"):
        codes = kernels.encode(x, W_enc, case.b_enc, k=6, impl=impl)
        out = kernels.decode(codes, W_dec, case.b_dec[::2], impl=impl)
        change = Change("scale", torch.zeros(40), 1.0)
        changed = kernels.edit(x, W_enc, case.b_enc, case.theta, W_dec, change, impl=impl)
        g = kernels.weight_gradient(codes, x, deterministic=False, impl=impl)
        results.append((out, changed, g, kernels.products(codes, x, W_dec, impl=impl).sum(dim=1)))
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-6


@pytest.mark.parametrize("k", [1, 64])
def test_sizes_of_the_top_k(k):
    case = random_case(frames=3, d=16, n=k + 10, seed=4)
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=k, impl="triton")
    expected = dense_codes(case, k)[0]
    assert codes.values.shape == (3, k)
    assert error(codes.dense().sort(dim=1).values, expected.sort(dim=1).values) < 1e-6
    assert codes.indices.sort(dim=1).values.diff(dim=1).gt(0).all()  # no latent twice


def test_a_frame_without_any_number():
    """NaN is no code by threshold, and stays in its own frame."""
    case = random_case(frames=4, d=16, n=40)
    x = case.x.clone()
    x[1] = float("nan")
    usual = kernels.encode(case.x, case.W_enc, case.b_enc, theta=case.theta, impl="triton").dense()
    found = kernels.encode(x, case.W_enc, case.b_enc, theta=case.theta, impl="triton").dense()
    assert torch.equal(found[[0, 2, 3]], usual[[0, 2, 3]]) and found[1].abs().max() == 0
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    edited = kernels.edit(x, *rows, Change("scale", torch.zeros(40), 1.0), impl="triton")
    assert edited[1].isnan().all() and not edited[[0, 2, 3]].isnan().any()


def test_offsets_beyond_int32():
    """Rows that begin past 2^31 numbers. The weights are never touched but for their last row, so that the
    memory is only promised."""
    d, n = 1280, 2**31 // 1280 + 16
    weights = torch.empty(n, d, dtype=torch.float16)
    weights[-1] = torch.arange(d) % 7
    last = kernels.Codes(torch.tensor([[2.0]]), torch.tensor([[n - 1]], dtype=torch.int32), n, (1,))
    assert (n - 1) * d > 2**31
    out = triton_launch.decode(last, weights)
    assert torch.equal(out[0].float(), 2.0 * (torch.arange(d) % 7))
    left = torch.ones(1, d, dtype=torch.float16)
    assert triton_launch.products(last, left, weights).tolist() == [[float((torch.arange(d) % 7).sum())]]


def test_deterministic_and_atomic_gradients_agree():
    case = random_case(frames=30, d=10, n=25, seed=5)
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=6, impl="triton")
    exact = codes.dense().double().T @ case.x.double()
    first = kernels.weight_gradient(codes, case.x, deterministic=True, impl="triton")
    again = kernels.weight_gradient(codes, case.x, deterministic=True, impl="triton")
    assert torch.equal(first, again) and error(first, exact) < 1e-6
    assert error(kernels.weight_gradient(codes, case.x, deterministic=False, impl="triton"), exact) < 1e-6
    unused = codes.dense().abs().sum(dim=0) == 0
    assert first[unused].abs().sum() == 0
