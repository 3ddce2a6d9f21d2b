"""Which implementation runs, and why.

By device first: Triton on CUDA, the fast CPU kernels on a CPU, plain torch anywhere else. Then by
density: a sparse product over k of n latents beats the dense one only below some k / n, which differs
with device and dtype. BREAK_EVEN holds what benchmarks.kernels measured; `measure_break_even` replaces an
entry by this machine's own figure.

WHISPER_STEER_KERNELS=reference, cpu or triton (or `impl=` in a call) overrules the choice; each choice
and its reason are logged once, at level INFO, by the logger "whisper_steer.kernels".
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from ..errors import UsageError
from . import cpu, reference, triton_launch
from .codes import Codes

logger = logging.getLogger("whisper_steer.kernels")

IMPLEMENTATIONS = ("reference", "cpu", "triton")
VARIABLE = "WHISPER_STEER_KERNELS"

# k / n up to which the sparse decode is chosen. CPU: measured (docs/kernels.md). CUDA: derived from
# traffic at d = 768 (equal near k = 52 of 6144), not measured.
BREAK_EVEN: dict[tuple[str, torch.dtype], float] = {
    ("cpu", torch.float32): 0.2,
    ("cpu", torch.float16): 0.2,
    ("cpu", torch.bfloat16): 0.2,
    ("cpu", torch.float64): 0.2,
    ("cuda", torch.float32): 0.05,
    ("cuda", torch.float16): 0.0085,
    ("cuda", torch.bfloat16): 0.0085,
    ("cuda", torch.float64): 0.0,
}
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """implementation: one of IMPLEMENTATIONS, or "dense": plain torch's dense product. reason: why, in
    words."""

    implementation: str
    reason: str


def choose(
    operation: str, device: torch.device, dtype: torch.dtype, *, density: float = 0.0, impl: str | None = None
) -> Choice:
    """What runs `operation` ("encode", "decode", "edit", ...) there. density: stored codes per latent and
    frame, of the operations whose dense form is an alternative.

    Raises UsageError: an unknown implementation is asked for, or one that cannot run there.
    """
    forced = impl or os.environ.get(VARIABLE) or None
    # few steps, so that a choice is logged once and not for every batch
    step = 0.0 if density == 0 else float(f"{density:.1g}")
    over = density > BREAK_EVEN.get((device.type, dtype), 1.0)
    return _choose(operation, device.type, dtype, step, over, forced, "impl" if impl else VARIABLE)


@lru_cache(maxsize=4096)
def _choose(
    operation: str,
    device: str,
    dtype: torch.dtype,
    density: float,
    over: bool,
    forced: str | None,
    source: str,
) -> Choice:
    if forced is not None:
        choice = _forced(operation, device, dtype, forced, source)
    elif over and operation in ("decode", "weight_gradient", "products"):
        limit = BREAK_EVEN[(device, dtype)]
        choice = Choice(
            "dense",
            f"about {100 * density:g} % of the latents are codes, sparse wins up to {100 * limit:g} %",
        )
    else:
        choice = _by_device(device, dtype)
    logger.info(
        "%s on %s in %s: %s (%s)", operation, device, str(dtype)[6:], choice.implementation, choice.reason
    )
    return choice


def _by_device(device: str, dtype: torch.dtype) -> Choice:
    if device == "cpu":
        return Choice("cpu", "a CPU")
    if device == "cuda":
        problem = triton_launch.problem(device)
        if problem is None and dtype in TRITON_DTYPES:
            return Choice("triton", "CUDA")
        return Choice("reference", problem or f"no Triton kernels for {str(dtype)[6:]}")
    return Choice("reference", f"no kernels for {device}")


def _forced(operation: str, device: str, dtype: torch.dtype, forced: str, source: str) -> Choice:
    if forced not in IMPLEMENTATIONS:
        raise UsageError(f"{source} is {forced!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    problem = None
    if forced == "cpu" and device != "cpu":
        problem = f"the tensors are on {device}"
    elif forced == "triton":
        problem = triton_launch.problem(device)
        if dtype not in TRITON_DTYPES:
            problem = problem or f"it has no kernels for {str(dtype)[6:]}"
    if problem:
        raise UsageError(
            f"{source}={forced} cannot {operation} here ({problem}): leave the choice to whisper-steer"
        )
    return Choice(forced, f"{source}={forced}")


def measure_break_even(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    d_model: int = 768,
    n_latents: int = 6144,
    frames: int = 512,
) -> float:
    """Time sparse against dense decoding for growing k and take the largest k / n at which sparse still
    wins; from then on `choose` uses it in this process. Takes seconds; on CUDA it waits for the
    device."""
    device = torch.device(device)
    choice = _by_device(device.type, dtype)
    sparse = {"cpu": cpu.decode, "triton": triton_launch.decode, "reference": reference.decode}[
        choice.implementation
    ]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(n_latents, d_model, generator=generator).to(device, dtype)
    found, k = 0.0, 8
    while k <= n_latents // 2:
        indices = torch.rand(frames, n_latents, generator=generator).topk(k, dim=1).indices.int()
        values = torch.rand(frames, k, generator=generator)
        codes = Codes(values.to(device), indices.to(device), n_latents, (frames,))
        dense = codes.dense().to(dtype)
        sparse_s = _seconds(partial(sparse, codes, weights), device)
        if sparse_s > _seconds(partial(torch.matmul, dense, weights), device):
            break
        found, k = k / n_latents, k * 2
    BREAK_EVEN[(device.type, dtype)] = found
    _choose.cache_clear()
    return found


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of several runs, after one untimed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for repeat in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best
