"""Sparse autoencoders and activations for tests of kernels, and checks that every implementation must pass.

`check` compares one implementation with the reference in float64 on the same (rounded) numbers.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from whisper_steer import kernels
from whisper_steer.kernels import MODES, Change, Codes

# relative errors, of whole results; codes this close to the threshold may fall on either side of it
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float64: 1e-12}
NEAR = 1e-5


@dataclass(frozen=True)
class Case:
    """x (frames, d), W_enc, W_dec (n, d), b_enc, theta (n,), b_dec (d,)."""

    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    theta: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor

    def to(self, dtype=None, device=None):
        return replace(self, **{name: part.to(device, dtype) for name, part in vars(self).items()})


def random_case(frames=18, d=48, n=70, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    return Case(
        x=normal(frames, d),
        W_enc=normal(n, d) / d**0.5,
        b_enc=0.1 * normal(n),
        theta=0.5 + torch.rand(n, generator=g),
        W_dec=normal(n, d),
        b_dec=normal(d),
    )


def adversarial(frames=18, d=48, n=70):
    """Name -> case: what goes wrong first."""
    usual = random_case(frames, d, n)
    outlier = usual.x.clone()
    outlier[:, 5] = 3e4
    alternate = usual.x.clone()
    alternate[1::3] = -100.0 * usual.W_enc.sum(dim=0)  # frames without any code between others
    # whole numbers are exact in every dtype: pre-activations that equal their threshold are no codes
    g = torch.Generator().manual_seed(1)
    whole = {
        name: torch.randint(-2, 3, part.shape, generator=g).float() for name, part in vars(usual).items()
    }
    return {
        "random": usual,
        "one frame": random_case(1, d, n),
        "one latent": random_case(frames, d, 1),
        "outlier dimension": replace(usual, x=outlier),
        "frames without codes": replace(usual, x=alternate),
        "every latent a code": replace(usual, theta=torch.full((n,), -50.0), b_enc=torch.full((n,), 20.0)),
        "thresholds below zero": replace(usual, theta=torch.full((n,), -1.0)),
        "ties": Case(**whole),
        "denormals": replace(usual, x=1e-39 * usual.x, b_enc=torch.zeros(n), theta=torch.zeros(n)),
    }


def error(found, expected):
    """|found - expected| / |expected| over all entries; what is smaller than any normal number counts as
    0."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-36))


def dense_codes(case, k=None):
    """The reference's codes in float64 (frames, n), and where they are too close to call."""
    exact = case.to(torch.float64)
    pre = exact.x @ exact.W_enc.T + exact.b_enc
    if k is None:
        codes = torch.where(pre > exact.theta, pre.relu(), 0.0)
        gap = pre - exact.theta.clamp_min(0)
    else:
        best = pre.relu().topk(min(k, pre.shape[1]), dim=1)
        codes = torch.zeros_like(pre).scatter(1, best.indices, best.values)
        gap = pre - best.values[:, -1:]
    size = exact.x.norm(dim=1, keepdim=True) * exact.W_enc.norm(dim=1)
    return codes, (gap.abs() < NEAR * size) & (gap != 0)


def check(case, impl, dtype=torch.float32, device="cpu", k=5):
    """Encode, decode, edit and both gradients of `impl` against the reference in float64."""
    case = case.to(dtype).to(torch.float64)  # what the implementation sees, exactly
    given, most = case.to(dtype, device), TOLERANCE[dtype]

    def off(found, expected):
        """The error, but for results all of which are smaller than any normal number: a GPU may take such
        for 0, as its atomic additions do."""
        denormal = device != "cpu" and float(expected.double().norm()) < 1e-36
        found = error(found, expected)
        return 0.0 if denormal and found < 1 else found

    # codes are float32 whatever comes in; a GPU's tensor cores add products of halves up less exactly
    close = most if dtype == torch.float64 or device != "cpu" else min(most, 1e-6)

    codes = kernels.encode(given.x, given.W_enc, given.b_enc, theta=given.theta, impl=impl)
    expected, unsure = dense_codes(case)
    assert off(codes.dense().cpu().masked_fill(unsure, 0), expected.masked_fill(unsure, 0)) < close
    assert codes.indices.dtype == torch.int32 and codes.complete

    largest = kernels.encode(given.x, given.W_enc, given.b_enc, k=k, impl=impl)
    wanted = dense_codes(case, k)[0].sort(dim=1).values
    assert off(largest.dense().cpu().sort(dim=1).values, wanted) < close
    assert largest.values.shape == (len(case.x), min(k, len(case.W_enc)))

    for some in (codes, largest, codes.padded().compact()):
        full = some.dense().double().cpu()
        decoded = kernels.decode(some, given.W_dec, given.b_dec, impl=impl)
        assert decoded.dtype == dtype
        assert off(decoded, full @ case.W_dec + case.b_dec) < most
        g = random_case(len(case.x), case.x.shape[1], seed=3).x.to(dtype)
        for fixed in (True, False):
            found = kernels.weight_gradient(some, g.to(device), deterministic=fixed, impl=impl)
            assert off(found, full.T @ g.double()) < most
        found = kernels.products(some, g.to(device), given.W_dec, impl=impl)
        places = some.csr() if some.offsets is None else some
        flat = found[some.values != 0] if some.offsets is None else found
        one_by_one = g.double()[places.rows().cpu()] * case.W_dec[places.indices.long().cpu()]
        assert off(flat, one_by_one.sum(dim=1)) < most

    gate = torch.rand(len(case.x), generator=torch.Generator().manual_seed(4))
    gate[::3] = 0
    few = slice(0, 13)
    values = random_case(seed=5, n=13).theta
    for mode in MODES:
        for floor in (True, False):
            for g in (None, gate):
                exact = [part[few] for part in (case.W_enc, case.b_enc, case.theta, case.W_dec)]
                size = len(exact[0])
                change = Change(mode, values[:size].to(dtype).to(torch.float64), 0.7, floor)
                expected = kernels.edit(case.x, *exact, change, gate=g, impl="reference")
                rounded = replace(change, values=change.values.to(device, dtype))
                gates = None if g is None else g.to(device)
                found = kernels.edit(
                    given.x, *(part.to(device, dtype) for part in exact), rounded, gate=gates, impl=impl
                )
                assert found.dtype == dtype
                assert off(found, expected) < most
                if g is not None:
                    assert torch.equal(found[g == 0], given.x[g == 0])


def codes_of(rows, n):
    """CSR codes from one dict latent -> value per frame."""
    dense = torch.zeros(len(rows), n)
    for number, row in enumerate(rows):
        for latent, value in row.items():
            dense[number, latent] = value
    return Codes.of(dense)


@contextmanager
def no_waiting():
    """Within the block, what makes the host wait for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
