"""The Triton kernels in Triton's interpreter, on the CPU. Run by test_kernels_triton.py in a process of
its own: the interpreter is chosen when Triton is imported.

Not collected by its name.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import adversarial, check, dense_codes, error, random_case

from whisper_steer import kernels
from whisper_steer.errors import UsageError
from whisper_steer.kernels import choose, triton_launch

KEPT = ("frames without codes", "ties", "denormals")


@pytest.mark.parametrize("name", KEPT)
def test_float32(name):
    check(adversarial(5, 20, 40)[name], "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(random_case(frames=3, d=24, n=40), "triton", dtype)


@pytest.mark.parametrize(("frames", "d", "n", "k"), [(0, 16, 32, 3), (2, 70, 33, 20), (17, 7, 20, 9)])
def test_shapes(frames, d, n, k):
    check(random_case(frames, d, n, seed=7), "triton", k=k)


def test_rows_with_more_codes_than_places():
    case = random_case(5, 20, 160)
    arguments = (case.x, case.W_enc, case.b_enc + 9)
    everything = torch.full((160,), -1.0)
    short = kernels.encode(*arguments, theta=everything, width=8, impl="triton")
    assert short.values.shape == (5, 8) and not short.complete
    assert (short.counts > 140).all()
    assert torch.equal(short.indices, torch.arange(8, dtype=torch.int32).expand(5, 8))  # the first ones stay
    # without a width, all: more than are tried first
    whole = kernels.encode(*arguments, theta=everything, impl="triton")
    assert whole.complete and whole.values.shape[1] > triton_launch.FIRST_WIDTH
    expected = (case.x.double() @ case.W_enc.double().T + case.b_enc.double() + 9).relu()
    assert error(whole.dense(), expected) < 1e-6


def test_ties_of_the_running_top_k_go_to_the_lower_latent():
    x, W_enc = torch.ones(2, 4), torch.ones(100, 4)
    codes = kernels.encode(x, W_enc, torch.zeros(100), k=5, impl="triton")
    assert codes.values.tolist() == [[4.0] * 5] * 2
    assert codes.indices.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_large_k_is_taken_in_chunks(monkeypatch):
    monkeypatch.setattr(triton_launch, "CHUNK", 7)
    case = random_case(n=200)
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=150, impl="triton")
    assert codes.values.shape == (18, 150)
    assert error(codes.dense(), dense_codes(case, 150)[0]) < 1e-6


def test_many_edited_latents_go_to_the_reference(monkeypatch):
    monkeypatch.setattr(triton_launch, "MOST_EDITED", 69)
    case = random_case()
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    change = kernels.Change("scale", torch.zeros(70), 1.0)
    found = kernels.edit(case.x, *rows, change, impl="triton")
    assert torch.equal(found, kernels.edit(case.x, *rows, change, impl="reference"))


def test_gradients():
    case = random_case(frames=6, d=12, n=20)
    results = []
    for impl in ("triton", "reference"):
        parts = [p.clone().requires_grad_() for p in (case.x, case.W_enc, case.b_enc, case.W_dec)]
        codes = kernels.encode(*parts[:3], theta=case.theta, impl=impl)
        kernels.decode(codes, parts[3], impl=impl).square().sum().backward()
        results.append([p.grad for p in parts])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_has_no_float64():
    with pytest.raises(UsageError, match="no kernels for float64"):
        choose("edit", torch.device("cpu"), torch.float64, impl="triton")
