"""Which implementation runs, and why.

By device first: Triton on CUDA, the fast CPU kernels on a CPU, plain torch anywhere else. Then by
density: a sparse product over k of n latents beats the dense one only below some k / n, which differs
with operation, device and dtype. BREAK_EVEN holds what was measured; `measure_break_even` replaces an entry
by this machine's own figure.

WHISPER_STEER_KERNELS=reference, cpu or triton (or `impl=` in a call) overrules the choice; each choice
and its reason are logged once, at level INFO, by the logger "whisper_steer.kernels".
"""

from __future__ import annotations

import logging
import math
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

# Operations that have a dense form, and k / n up to which the sparse one is chosen. CPU: measured with
# `python -m benchmarks.kernels_break_even` at (d, n) = (768, 6144) and (192, 1536), the lower of the two
# (docs/kernels.md). CUDA: on an H200, at (768, 6144); decode in half precision from its times by k.
BY_DENSITY = ("decode", "products", "weight_gradient")
_LIMITS = {
    ("cpu", torch.float32): (0.19, 0.095, 0.23),
    ("cpu", torch.float16): (0.5, 0.5, 0.3),  # torch multiplies float16 slowly on a CPU
    ("cpu", torch.bfloat16): (0.25, 0.04, 0.22),
    ("cpu", torch.float64): (0.09, 0.075, 0.0),
    ("cuda", torch.float32): (0.07, 0.12, 0.03),
    ("cuda", torch.float16): (0.02, 0.023, 0.03),
    ("cuda", torch.bfloat16): (0.02, 0.05, 0.024),
    ("cuda", torch.float64): (0.0, 0.0, 0.0),
}
BREAK_EVEN: dict[tuple[str, str, torch.dtype], float] = {
    (operation, device, dtype): limit
    for (device, dtype), limits in _LIMITS.items()
    for operation, limit in zip(BY_DENSITY, limits, strict=True)
}
# shares of codes that `measure_break_even` tries
SHARES = (0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
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
    over = density > BREAK_EVEN.get((operation, device.type, dtype), 1.0)
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
    elif over:
        limit = BREAK_EVEN[operation, device, dtype]
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
    operation: str = "decode",
    d_model: int = 768,
    n_latents: int = 6144,
    frames: int = 512,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time the sparse form of `operation` (one of BY_DENSITY) against its dense one for a growing share
    k / n of codes, and return the share up to which sparse wins: 0 if never, the largest that was tried if
    always, else between two that were tried, where both would take the same time.

    From then on `choose` uses it in this process. Takes seconds; on CUDA it waits for the device. clock:
    seconds, time.process_time on a machine that does other work.

    Raises UsageError: an operation without a dense form to compare with.
    """
    if operation not in BY_DENSITY:
        raise UsageError(f"operation is {operation!r}: expected one of {', '.join(BY_DENSITY)}")
    device = torch.device(device)
    module = {"cpu": cpu, "triton": triton_launch, "reference": reference}[
        _by_device(device.type, dtype).implementation
    ]
    generator = torch.Generator().manual_seed(0)
    weights, g = (
        torch.randn(size, d_model, generator=generator).to(device, dtype) for size in (n_latents, frames)
    )
    sparse, dense = {
        "decode": (partial(module.decode, W_dec=weights), partial(reference.dense_rows, weights=weights)),
        "products": (
            partial(module.products, left=g, right=weights),
            partial(reference.dense_products, left=g, right=weights),
        ),
        "weight_gradient": (partial(module.weight_gradient, g=g), partial(reference.weight_gradient, g=g)),
    }[operation]
    found, before = 0.0, 0.0
    for share in SHARES:
        k = max(1, round(share * n_latents))
        share = k / n_latents
        indices = torch.rand(frames, n_latents, generator=generator).topk(k, dim=1).indices.int()
        values = torch.rand(frames, k, generator=generator)
        codes = Codes(values.to(device), indices.to(device), n_latents, (frames,))
        sparse_s = _seconds(partial(sparse, codes), device, clock)
        slower = math.log(sparse_s / _seconds(partial(dense, codes), device, clock))
        if slower > 0:
            # log(sparse / dense) is about straight in the share
            if found:
                found += (share - found) * before / (before - slower)
            break
        found, before = share, slower
    BREAK_EVEN[(operation, device.type, dtype)] = found
    _choose.cache_clear()
    return found


def _seconds(
    run: Callable[[], object], device: torch.device, clock: Callable[[], float], repeats: int = 5
) -> float:
    """The shortest of several runs, after one untimed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for repeat in range(repeats + 1):
        wait()
        start = clock()
        run()
        wait()
        if repeat:
            best = min(best, clock() - start)
    return max(best, 1e-9)
