"""Kernels on the CPU against the reference in float64; codes and their layouts; what is chosen and why."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NEAR, TOLERANCE, adversarial, check, codes_of, dense_codes, error, random_case

from whisper_steer import kernels
from whisper_steer.errors import UsageError
from whisper_steer.kernels import Change, Codes, choice, choose, cpu

CPU = torch.device("cpu")

# -- against float64 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_float32(impl, name):
    check(adversarial()[name], impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    check(random_case(), "cpu", dtype)


@pytest.mark.parametrize("d", [384, 512, 768, 1024, 1280])
def test_whispers_widths(d):
    check(random_case(frames=3, d=d, n=160, seed=d), "cpu", k=50)


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(0, 40), d=st.integers(1, 70), n=st.integers(1, 90), k=st.integers(1, 95),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(frames, d, n, k, seed):
    check(random_case(frames, d, n, seed), "cpu", k=k)


def test_many_codes_and_many_blocks():
    """k = 512, more frames than a block holds, and dimensions of any kind before the last."""
    case = random_case(frames=300, d=24, n=700, seed=8)
    x = case.x.reshape(3, 2, 50, 24)
    largest = kernels.encode(x, case.W_enc, case.b_enc, k=512)
    assert largest.lead == (3, 2, 50) and largest.values.shape == (300, 512)
    out = kernels.decode(largest, case.W_dec, case.b_dec)
    assert out.shape == x.shape
    expected = dense_codes(case, 512)[0] @ case.W_dec.double() + case.b_dec.double()
    assert error(out.reshape(300, 24), expected) < TOLERANCE[torch.float32]


def test_non_contiguous_input():
    case = random_case(frames=36, d=96)
    x, W_enc, W_dec = case.x.T.contiguous().T[::2, ::2], case.W_enc[:, ::2], case.W_dec[:, ::2]
    assert not x.is_contiguous() and not W_dec.is_contiguous()
    found = kernels.encode(x, W_enc, case.b_enc, theta=case.theta)
    expected = kernels.encode(x.contiguous(), W_enc.contiguous(), case.b_enc, theta=case.theta)
    torch.testing.assert_close(found.dense(), expected.dense())
    bias = case.b_dec[::2]
    out = kernels.decode(found, W_dec, bias)
    torch.testing.assert_close(out, kernels.decode(expected, W_dec.contiguous(), bias))
    rows = (W_enc, case.b_enc, case.theta, W_dec)
    change = Change("scale", torch.zeros(70), 1.0)
    torch.testing.assert_close(kernels.edit(x, *rows, change), kernels.edit(x.contiguous(), *rows, change))


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("outlier", [False, True])
def test_screening_in_bfloat16_misses_no_code(monkeypatch, offset, outlier):
    monkeypatch.setattr(cpu, "SCREEN_SHARE", 1.0)
    case = random_case(frames=200, d=64, n=300, seed=6)
    x = case.x + offset
    if outlier:
        x[:, 3] *= 100
    screened = []
    found_by = cpu._Screen.codes
    monkeypatch.setattr(cpu._Screen, "codes", lambda self, x: screened.append(len(x)) or found_by(self, x))
    found = cpu.encode_threshold(x, case.W_enc, case.b_enc, case.theta, screen=True)
    exact = cpu.encode_threshold(x.double(), case.W_enc.double(), case.b_enc.double(), case.theta.double())
    gap = x.double() @ case.W_enc.double().T + case.b_enc.double() - case.theta.double()
    unsure = gap.abs() < NEAR * x.double().norm(dim=1, keepdim=True)
    assert screened == [200]
    assert error(found.dense().masked_fill(unsure, 0), exact.dense().masked_fill(unsure, 0)) < 1e-6
    assert torch.equal((found.dense() > 0) & ~unsure, (exact.dense() > 0) & ~unsure)


def test_screening_gives_up_where_it_finds_too_much_or_its_bound_fails():
    case = random_case(frames=40)
    everything = torch.full((70,), -1.0)  # about half of all latents are codes
    weights = (case.W_enc, case.b_enc, everything)
    plain = cpu.encode_threshold(case.x, *weights, screen=False)
    assert torch.equal(cpu.encode_threshold(case.x, *weights, screen=True).dense(), plain.dense())
    broken = case.x.clone()
    broken[3] = float("inf")
    found = cpu.encode_threshold(broken, case.W_enc, case.b_enc, case.theta, screen=True)
    expected = kernels.encode(case.x[:3], case.W_enc, case.b_enc, theta=case.theta)
    torch.testing.assert_close(found.dense()[:3], expected.dense())
    assert cpu._Screen.make(case.x, 0 * case.W_enc, case.b_enc, case.theta) is None


def test_nan_is_no_code_and_stays_in_an_edit():
    case = random_case(frames=4)
    x = case.x.clone()
    x[1] = float("nan")
    assert kernels.encode(x, case.W_enc, case.b_enc, theta=case.theta).per_frame()[1] == 0
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    edited = kernels.edit(x, *rows, Change("scale", torch.zeros(70), 1.0))
    assert edited[1].isnan().all() and not edited[[0, 2, 3]].isnan().any()


def test_edits_written_out():
    """One frame, two latents with codes 3 and (below its threshold) 0."""
    W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = (W_enc, torch.zeros(2), torch.tensor([1.0, 5.0]), torch.tensor([[10.0, 0.0], [0.0, 10.0]]))
    x = torch.tensor([[3.0, 4.0]])

    def edited(mode, values, amount, **options):
        change = Change(mode, torch.tensor(values), amount, **options)
        return kernels.edit(x, *rows, change).tolist()[0]

    assert edited("add", [1.0, 2.0], 0.5) == [3 + 5, 4 + 10]
    assert edited("add", [-8.0, -2.0], 0.5) == [3 - 30, 4]  # not below 0
    assert edited("add", [-8.0, -2.0], 0.5, floor=False) == [3 - 40, 4 - 10]
    assert edited("scale", [0.0, 0.0], 0.5) == [3 - 15, 4]
    assert edited("scale", [0.0, 7.0], 4.0) == [3 - 30, 4]  # not turned around
    assert edited("clamp", [1.0, 2.0], 0.5) == [3 - 10, 4 + 10]
    assert edited("clamp", [1.0, 2.0], 9.0) == [3 - 20, 4 + 20]


def test_an_edit_of_nothing_but_closed_frames_is_the_input():
    case = random_case(frames=6)
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    change = Change("add", torch.ones(70), 1.0)
    x = -case.x.abs() * 0.0  # negative zeros: the bits must stay, too
    found = kernels.edit(x, *rows, change, gate=torch.zeros(6))
    assert torch.equal(found.view(torch.int32), x.view(torch.int32)) and x.view(torch.int32).min() < 0


# -- codes ----------------------------------------------------------------------------------------------


def test_layouts():
    codes = codes_of([{1: 2.0, 3: 4.0}, {}, {0: 5.0}], 4)
    assert codes.offsets.tolist() == [0, 2, 2, 3] and codes.indices.tolist() == [1, 3, 0]
    assert codes.per_frame().tolist() == [2, 0, 1] and codes.rows().tolist() == [0, 0, 2]
    assert codes.density == 3 / 12
    padded = codes.padded(3)
    assert padded.values.tolist() == [[2, 4, 0], [0, 0, 0], [5, 0, 0]]
    assert padded.per_frame().tolist() == [2, 0, 1] and padded.complete
    for same in (padded, padded.csr(), padded.compact(), codes.padded()):
        assert torch.equal(same.dense(), codes.dense())
    assert padded.compact().indices.dtype == torch.int16
    assert padded.csr().offsets.tolist() == [0, 2, 2, 3]
    with pytest.raises(UsageError, match="a frame has 2 codes: expected a width of at least that, not 1"):
        codes.padded(1)


def test_transposing():
    codes = codes_of([{1: 2.0, 3: 4.0}, {}, {0: 5.0, 1: 6.0}], 4)
    turned = codes.transposed()
    assert turned.offsets.tolist() == [0, 1, 3, 3, 4]
    assert turned.indices.tolist() == [2, 0, 2, 0] and turned.values.tolist() == [5, 2, 6, 4]
    assert torch.equal(codes.padded().transposed().dense(), codes.dense().T)


def test_more_latents_than_int16_holds():
    codes = Codes(torch.ones(1, 2), torch.tensor([[3, 40_000]], dtype=torch.int32), 50_000, (1,))
    assert codes.compact() is codes
    turned = codes.transposed()
    assert turned.offsets[[3, 4, 40_000, 40_001]].tolist() == [0, 1, 1, 2]


def test_codes_that_do_not_fit_their_frames():
    with pytest.raises(UsageError, match=r"2 frames have values of shape \(3, 1\)"):
        Codes(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32), 4, (2,))
    with pytest.raises(UsageError, match=r"\(3, 1\) values and \(3, 2\) indices"):
        Codes(torch.ones(3, 1), torch.zeros(3, 2, dtype=torch.int32), 4, (3,))


# -- arguments ------------------------------------------------------------------------------------------


def test_arguments_are_checked():
    case = random_case()
    weights = (case.W_enc, case.b_enc)
    for arguments, message in (
        ({}, "needs either theta or k"),
        ({"theta": case.theta, "k": 3}, "needs either theta or k"),
        ({"k": 0}, "k is 0: expected a whole number >= 1"),
        ({"theta": case.theta, "width": 0}, "width is 0"),
        ({"theta": case.theta[:3]}, r"theta has shape \(3,\): expected \(70,\)"),
    ):
        with pytest.raises(UsageError, match=message):
            kernels.encode(case.x, *weights, **arguments)
    with pytest.raises(UsageError, match=r"activations have shape \(18, 5\): expected \(..., 48\)"):
        kernels.encode_subset(case.x[:, :5], *weights, case.theta)
    codes = kernels.encode(case.x, *weights, k=3)
    with pytest.raises(UsageError, match=r"W_dec has shape \(3, 48\): expected \(70, d_model\)"):
        kernels.decode(codes, case.W_dec[:3])
    rows = (*weights, case.theta, case.W_dec)
    with pytest.raises(UsageError, match=r"gate has shape \(3,\): expected one value a frame, \(18,\)"):
        kernels.edit(case.x, *rows, Change("add", case.theta, 1.0), gate=torch.ones(3))
    with pytest.raises(UsageError, match=r"values has shape \(2,\)"):
        kernels.edit(case.x, *rows, Change("add", torch.ones(2), 1.0))
    with pytest.raises(UsageError, match="mode 'turn'"):
        Change("turn", case.theta, 1.0)


# -- choice ---------------------------------------------------------------------------------------------


def test_the_choice_and_its_reason(caplog):
    choice._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="whisper_steer.kernels"):
        found = [choose("decode", CPU, torch.float32, density=d) for d in (0.01, 0.01, 0.7)]
    assert [one.implementation for one in found] == ["cpu", "cpu", "dense"]
    assert len(caplog.messages) == 2  # once each
    assert "decode on cpu in float32: cpu (a CPU)" in caplog.messages[0]
    assert "about 70 % of the latents are codes, sparse wins up to 19 %" in caplog.messages[1]
    assert choose("edit", torch.device("meta"), torch.float32).implementation == "reference"


def test_the_choice_can_be_overruled(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "reference")
    assert choose("edit", CPU, torch.float32).implementation == "reference"
    assert choose("edit", CPU, torch.float32, impl="cpu").implementation == "cpu"
    monkeypatch.setenv(choice.VARIABLE, "fastest")
    with pytest.raises(
        UsageError, match="WHISPER_STEER_KERNELS is 'fastest': expected one of reference, cpu"
    ):
        choose("edit", CPU, torch.float32)
    with pytest.raises(UsageError, match="impl=triton cannot edit here"):
        choose("edit", CPU, torch.float32, impl="triton")
    with pytest.raises(UsageError, match="impl=cpu cannot edit here .the tensors are on meta"):
        choose("edit", torch.device("meta"), torch.float32, impl="cpu")


def test_dense_codes_are_decoded_densely():
    case = random_case()
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=60)
    assert codes.density > choice.BREAK_EVEN["decode", "cpu", torch.float32]
    expected = codes.dense() @ case.W_dec
    torch.testing.assert_close(kernels.decode(codes, case.W_dec), expected)
    g = torch.ones(18, 48)
    found = kernels.products(codes, g, case.W_dec)
    assert found.shape == (18, 60)
    torch.testing.assert_close(found, (g @ case.W_dec.T).gather(1, codes.indices.long()))


@pytest.mark.parametrize("operation", choice.BY_DENSITY)
def test_break_even_is_measured(monkeypatch, operation):
    monkeypatch.setattr(choice, "BREAK_EVEN", dict(choice.BREAK_EVEN))
    monkeypatch.setattr(choice, "SHARES", (1 / 8, 1 / 4, 1 / 2))
    # sparse takes e times as long when the share doubles, dense always 1: as fast at 3/8
    seconds = iter([math.exp(-1.0), 1.0, math.exp(-0.5), 1.0, math.exp(0.5), 1.0])
    ran = []
    monkeypatch.setattr(choice, "_seconds", lambda run, *_: ran.append(run()) or next(seconds))
    found = choice.measure_break_even(operation=operation, d_model=32, n_latents=64, frames=8)
    assert found == pytest.approx(3 / 8)
    for sparse, dense in zip(ran[::2], ran[1::2], strict=True):  # what is timed is the same product
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    assert choice.BREAK_EVEN[operation, "cpu", torch.float32] == found
    assert choose(operation, CPU, torch.float32, density=0.4).implementation == "dense"
    assert choose(operation, CPU, torch.float32, density=0.3).implementation == "cpu"
    choice._choose.cache_clear()


def test_break_even_at_the_ends(monkeypatch):
    monkeypatch.setattr(choice, "BREAK_EVEN", dict(choice.BREAK_EVEN))
    for times, expected in (([2.0, 1.0], 0.0), ([1.0, 2.0] * len(choice.SHARES), 0.5)):
        seconds = iter(times)
        monkeypatch.setattr(choice, "_seconds", lambda *_, left=seconds: next(left))
        assert choice.measure_break_even(d_model=8, n_latents=1000, frames=2) == expected
    with pytest.raises(UsageError, match="operation is 'edit': expected one of decode, products"):
        choice.measure_break_even(operation="edit")
    choice._choose.cache_clear()
