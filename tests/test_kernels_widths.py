"""Whisper's widths at 8 d and 32 d latents, batches of one frame and of 1500 x 16, half precision on hard
numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import adversarial, check, error, random_case

from whisper_steer import kernels


def rolled(d, times, frames, seed):
    """x (frames, d), W (times d, d): one block of weights, its columns turned by one more for every block,
    and pre-activations (frames, times d) in float64, at a block's cost."""
    g = torch.Generator().manual_seed(seed)
    x, block = torch.randn(frames, d, generator=g), torch.randn(d, d, generator=g) / d**0.5
    W = torch.cat([block.roll(turn, dims=1) for turn in range(times)])
    exact, turned = block.double(), x.double()
    return x, W, torch.cat([turned.roll(-turn, dims=1) @ exact.T for turn in range(times)], dim=1)


@pytest.mark.parametrize("times", [8, 32])
@pytest.mark.parametrize("d", [384, 512, 768, 1024, 1280])
def test_whispers_widths_and_expansions(d, times):
    x, W, pre = rolled(d, times, 3, seed=d)
    n, nothing = d * times, torch.zeros(d * times)
    theta = torch.full((n,), 2.5)
    theta[5::7] = 3.0
    codes = kernels.encode(x, W, nothing, theta=theta)
    unsure = (pre - theta.double()).abs() < 1e-5 * d**0.5
    expected = torch.where(pre > theta, pre, 0.0).masked_fill(unsure, 0)
    assert codes.values.numel() > n / 200
    assert error(codes.dense().masked_fill(unsure, 0), expected) < 1e-6
    for k in (1, 50, 512):
        largest = kernels.encode(x, W, nothing, k=k)
        wanted = pre.topk(k, dim=1).values.relu()
        assert error(largest.values.sort(dim=1, descending=True).values, wanted) < 1e-6
        places = pre.gather(1, largest.indices.long()).relu()
        assert error(largest.values, places) < 1e-6  # each value stands beside its own latent
    for some in (codes, largest, codes.padded().compact()):
        found = kernels.decode(some, W)
        indices, values = some.csr().indices.long(), some.csr().values.double()
        summed = torch.zeros(3, d, dtype=torch.float64)
        summed.index_add_(0, some.csr().rows(), values[:, None] * W[indices].double())
        assert error(found, summed) < 1e-6


@pytest.mark.parametrize("frames", [(1,), (16, 1500)])
def test_a_single_frame_and_a_whole_batch(frames):
    d, n = 8, 40
    case = random_case(frames=torch.Size(frames).numel(), d=d, n=n, seed=9)
    x = case.x.reshape(*frames, d)
    weights, exact = (case.W_enc, case.b_enc), case.to(torch.float64)
    pre = exact.x @ exact.W_enc.T + exact.b_enc
    unsure = (pre - exact.theta).abs() < 1e-6
    codes = kernels.encode(x, *weights, theta=case.theta)
    assert codes.lead == frames
    full = torch.where(pre > exact.theta, pre.relu(), 0.0)
    assert error(codes.dense().reshape(-1, n).masked_fill(unsure, 0), full.masked_fill(unsure, 0)) < 1e-6
    largest = kernels.encode(x, *weights, k=3)
    wanted = pre.relu().topk(3, dim=1).values
    assert error(largest.values.sort(dim=1, descending=True).values, wanted) < 1e-6
    out = kernels.decode(codes, case.W_dec, case.b_dec)
    dense = codes.dense().reshape(-1, n).double()
    assert out.shape == x.shape
    assert error(out.reshape(-1, d), dense @ exact.W_dec + exact.b_dec) < 1e-6
    few = [part[:13] for part in (case.W_enc, case.b_enc, case.theta, case.W_dec)]
    change = kernels.Change("scale", torch.zeros(13), 0.5)
    gate = (torch.arange(len(case.x)) % 3 / 2).reshape(frames)
    found = kernels.edit(x, *few, change, gate=gate)
    wide = replace(change, values=change.values.double())
    wanted = kernels.edit(
        x.double(), *(part.double() for part in few), wide, gate=gate.double(), impl="reference"
    )
    assert error(found, wanted) < 1e-6
    f = kernels.encode_subset(x, *few[:3])
    near = unsure[:, :13].reshape(f.shape)
    assert error(f.masked_fill(near, 0), full[:, :13].reshape(f.shape).masked_fill(near, 0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ties", "outlier dimension", "frames without codes", "every latent a code"])
def test_half_precision_on_hard_numbers(name, dtype):
    case = adversarial(7, 20, 30)[name]
    if name == "outlier dimension" and dtype == torch.float16:
        case = replace(case, x=case.x / 30)  # 1e3: what is edited must stay below 65,504
    check(case, "cpu", dtype)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e-39), (torch.float16, 1e-6), (torch.bfloat16, 1e-39)],
)
def test_denormals_are_numbers(dtype, size):
    """Weights of 1 / size bring activations too small for the dtype's normal numbers back to usual codes."""
    case = random_case(frames=9, d=24, n=40, seed=3)
    x = (size * case.x).to(dtype)
    assert float(x.abs().max()) < torch.finfo(dtype).tiny and x.abs().max() > 0
    W = (case.W_enc * min(1e30, 0.01 / size)).to(dtype)
    unit = float(size * min(1e30, 0.01 / size))
    theta, nothing = torch.full((40,), 0.3 * unit), torch.zeros(40)
    codes = kernels.encode(x, W, nothing, theta=theta)
    pre = x.double() @ W.double().T
    expected = torch.where(pre > theta.double(), pre, 0.0)
    assert (expected > 0).sum() > 20
    # scaled back up: `error` takes anything below 1e-36 for nothing
    assert error(codes.dense().double() / unit, expected / unit) < 1e-6
