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


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that have run."""
    names, run = [], triton_launch._run

    def noting(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(triton_launch, "_run", noting)
    return names


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


def test_pre_activations_are_written_in_parts(monkeypatch):
    """16 frames at a time, and what is left."""
    monkeypatch.setattr(triton_launch, "WRITTEN_BYTES", 1)
    case = random_case(frames=37, n=200)
    for rule, expected in (({"k": 150}, dense_codes(case, 150)), ({"theta": case.theta}, dense_codes(case))):
        codes = kernels.encode(case.x, case.W_enc, case.b_enc, **rule, impl="triton")
        exact, unsure = expected
        assert error(codes.dense().masked_fill(unsure, 0), exact.masked_fill(unsure, 0)) < 1e-6
        assert codes.values.shape[0] == 37


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_torch_rounds_the_sums_of_halves_triton_multiplies(monkeypatch, launched, dtype):
    monkeypatch.setattr(triton_launch, "_gives_float32_sums", lambda: False)
    check(random_case(frames=3, d=24, n=40), "triton", dtype)
    assert "encode_threshold" in launched and "keep_above" not in launched
    launched.clear()
    check(random_case(frames=3, d=24, n=40), "triton")
    assert "encode_threshold" not in launched and "keep_above" in launched


def test_edits_of_many_frames_in_float32_go_to_the_reference(monkeypatch, launched):
    monkeypatch.setattr(triton_launch, "MOST_FRAMES", 17)
    case = random_case(frames=18)
    change = kernels.Change("scale", torch.zeros(70), 1.0)
    for dtype, frames, fused in ((torch.float32, 18, 0), (torch.float32, 17, 1), (torch.float16, 18, 1)):
        given = case.to(dtype)
        rows = (given.W_enc, given.b_enc, given.theta, given.W_dec)
        launched.clear()
        found = kernels.edit(given.x[:frames], *rows, change, impl="triton")
        assert launched == ["edit"] * fused
        expected = kernels.edit(given.x[:frames], *rows, change, impl="reference")
        assert error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


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
