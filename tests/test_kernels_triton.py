"""The Triton kernels: in the interpreter wherever Triton is installed, on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import adversarial, check, no_waiting, random_case

from whisper_steer import kernels
from whisper_steer.kernels import triton_launch

INTERPRETED = [
    Path(__file__).with_name(name) for name in ("kernels_interpreted.py", "test_kernels_interpreted.py")
]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)
_problem = triton_launch.problem("cuda") if torch.cuda.is_available() else "no CUDA device"
needs_gpu = pytest.mark.skipif(_problem is not None, reason=_problem or "")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@needs_triton
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, INTERPRETED)],
        capture_output=True, text=True, env=environment, cwd=INTERPRETED[0].parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "26 passed" in done.stdout


def test_what_is_missing_is_said(monkeypatch):
    triton_launch.problem.cache_clear()
    monkeypatch.setattr(triton_launch, "_installed", lambda: False)
    assert triton_launch.problem("cpu") == "triton is not installed"
    triton_launch.problem.cache_clear()
    monkeypatch.setattr(triton_launch, "_installed", lambda: True)
    assert triton_launch.problem("cpu") == "triton has no kernels for cpu"
    monkeypatch.setattr(triton_launch, "interpreted", lambda: True)
    triton_launch.problem.cache_clear()
    assert triton_launch.problem("cpu") is None
    triton_launch.problem.cache_clear()


# -- on a GPU -------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", adversarial())
def test_on_a_gpu(name, dtype):
    if dtype != torch.float32 and name in ("outlier dimension", "denormals"):
        pytest.skip(f"not a number that {dtype} holds")
    check(adversarial()[name], "triton", dtype, "cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [384, 512, 768, 1024, 1280])
def test_whispers_widths_on_a_gpu(d, dtype):
    check(random_case(frames=300, d=d, n=8 * d, seed=d), "triton", dtype, "cuda", k=50)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [384, 768, 1280])
def test_halves_multiplied_by_triton_on_a_gpu(monkeypatch, d, dtype):
    """As with a torch that rounds the sums of such a product."""
    monkeypatch.setattr(triton_launch, "_gives_float32_sums", lambda: False)
    check(random_case(frames=300, d=d, n=8 * d, seed=d), "triton", dtype, "cuda", k=50)


@needs_gpu
def test_pre_activations_are_written_in_parts_on_a_gpu(monkeypatch):
    """As many frames at a time as memory is granted for; each frame's codes are those of one part."""
    case = random_case(frames=1000, d=768, n=6144, seed=1).to(torch.float32, "cuda")
    for rule in ({"theta": case.theta + 1}, {"theta": case.theta + 1, "width": 77}, {"k": 50}):
        codes = kernels.encode(case.x, case.W_enc, case.b_enc, **rule)
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch, "WRITTEN_BYTES", 4 * 6144 * 96)
            parts = kernels.encode(case.x, case.W_enc, case.b_enc, **rule)
        torch.testing.assert_close(parts.dense(), codes.dense(), rtol=1e-5, atol=1e-5)
        if codes.counts is not None:
            assert torch.equal(parts.counts, codes.counts)


@needs_gpu
@pytest.mark.parametrize("gated", [False, True])
def test_edits_of_many_frames_on_a_gpu(gated):
    """Float32 goes to the reference from some number of frames on: the same numbers on both sides of it."""
    frames = triton_launch.MOST_FRAMES + 1
    case = random_case(frames=frames, d=768, n=100, seed=2).to(torch.float32, "cuda")
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    change = kernels.Change("scale", torch.zeros(100, device="cuda"), 1.0)
    gate = torch.linspace(-0.5, 1, frames, device="cuda").clamp_min(0) if gated else None
    found = kernels.edit(case.x, *rows, change, gate=gate)
    fused = kernels.edit(case.x[1:], *rows, change, gate=None if gate is None else gate[1:])
    torch.testing.assert_close(found[1:], fused, rtol=1e-4, atol=1e-4)
    if gated:
        assert torch.equal(found[gate == 0], case.x[gate == 0])


@needs_gpu
def test_a_large_batch_on_a_gpu():
    case = random_case(frames=1, d=768, n=6144).to(torch.bfloat16, "cuda")
    x = torch.randn(16, 1500, 768, device="cuda", dtype=torch.bfloat16)
    for rule in ({"theta": case.theta + 1}, {"k": 50}, {"k": 512}):
        codes = kernels.encode(x, case.W_enc, case.b_enc, **rule)
        alone = kernels.encode(x[7, 90:91], case.W_enc, case.b_enc, **rule)
        torch.testing.assert_close(codes.dense()[7, 90:91], alone.dense(), rtol=1e-3, atol=1e-3)


@needs_gpu
# torch's own, while it prepares memory for its graphs
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("gated", [False, True])
def test_cuda_graphs_and_compile(gated):
    case = random_case(frames=300, d=768, n=100).to(torch.bfloat16, "cuda")
    rows = (case.W_enc, case.b_enc, case.theta, case.W_dec)
    change = kernels.Change("scale", torch.zeros(100, device="cuda"), 1.0)
    gate = torch.linspace(-0.5, 1, 300, device="cuda").clamp_min(0) if gated else None

    def run(x):
        return kernels.edit(x, *rows, change, gate=gate)

    expected = run(case.x)
    x = case.x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(case.x.flip(0))
    graph.replay()
    torch.testing.assert_close(out, run(case.x.flip(0)))
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(run, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(case.x), expected)


@needs_gpu
def test_nothing_waits_for_the_gpu():
    case = random_case(frames=300, d=768, n=600).to(torch.bfloat16, "cuda")
    few = [part[:100].contiguous() for part in (case.W_enc, case.b_enc, case.theta, case.W_dec)]
    change = kernels.Change("add", torch.ones(100, device="cuda"), 1.0)
    gate = torch.ones(300, device="cuda")
    g = torch.randn(300, 768, device="cuda", dtype=torch.bfloat16)

    def everything():
        kernels.edit(case.x, *few, change, gate=gate)
        kernels.encode_subset(case.x, *few[:3])
        for rule in ({"theta": case.theta, "width": 256}, {"k": 50}):
            codes = kernels.encode(case.x, case.W_enc, case.b_enc, **rule)
            kernels.decode(codes, case.W_dec, case.b_dec)
            kernels.products(codes, g, case.W_dec)
            kernels.weight_gradient(codes, g, deterministic=True)

    everything()  # compiles
    with no_waiting():
        everything()


@needs_gpu
def test_gradients_repeat_where_asked():
    case = random_case(frames=500, d=768, n=600).to(torch.bfloat16, "cuda")
    codes = kernels.encode(case.x, case.W_enc, case.b_enc, k=50)
    g = torch.randn(500, 768, device="cuda")
    first = kernels.weight_gradient(codes, g, deterministic=True)
    assert all(torch.equal(kernels.weight_gradient(codes, g, deterministic=True), first) for _ in range(5))
    loose = kernels.weight_gradient(codes, g, deterministic=False)
    torch.testing.assert_close(loose, first, rtol=1e-4, atol=1e-4)
