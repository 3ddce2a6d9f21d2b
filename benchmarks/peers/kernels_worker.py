"""What the kernel benchmark's scripts share: made-up weights, activations and codes, and the stopwatch.

Used by benchmarks.kernels itself and, started by path in a peer's own environment where whisper_steer is
not installed, by kernels_<library>.py: this file needs torch alone. The request is one JSON file, the
answer one JSON line, the last one on stdout: nanoseconds per frame by operation, or an operation's error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], object]


@dataclass(frozen=True)
class Request:
    """One size on one device.

    Attributes: seconds: to spend on one operation, about; at least `repeats` runs are timed. clock:
    "wall", or "cpu": processor time of this process, for one thread on a machine that does other work.
    """

    d: int
    n: int
    k: int
    frames: int
    dtype: str
    device: str
    threads: int
    repeats: int
    seconds: float
    clock: str


@dataclass(frozen=True)
class Sizes:
    """x (frames, d), W_enc, W_dec (n, d), b_enc, theta (n,), b_dec (d,), codes: values and indices
    (frames, k).

    theta lets about k latents of a frame pass.
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    theta: Tensor
    values: Tensor
    indices: Tensor


def made(request: Request) -> Sizes:
    """Random, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    d, n, k, frames = request.d, request.n, request.k, request.frames
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    x = torch.randn(frames, d, generator=generator)
    sample = x[:64] @ rows.T
    theta = float(sample.flatten().kthvalue(max(1, round(sample.numel() * (1 - k / n)))).values)
    picked = [torch.randperm(n, generator=generator)[:k].sort().values for _ in range(min(frames, 512))]
    indices = torch.stack(picked).repeat(-(-frames // len(picked)), 1)[:frames]
    values = torch.rand(frames, k, generator=generator)

    def there(part: Tensor) -> Tensor:
        return part.to(request.device, getattr(torch, request.dtype))

    return Sizes(
        x=there(x), W_enc=there(rows), b_enc=there(torch.zeros(n)), W_dec=there(rows.clone()),
        b_dec=there(torch.zeros(d)), theta=there(torch.full((n,), theta)), values=there(values),
        indices=indices.to(request.device),
    )  # fmt: skip


def nanoseconds(work: Work, request: Request) -> float:
    """Per frame: the shortest of at least `repeats` runs, after an untimed one."""
    cuda = request.device.startswith("cuda")
    clock = time.process_time if request.clock == "cpu" else time.perf_counter

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    best, spent, runs = float("inf"), 0.0, -1
    while runs < request.repeats or spent < request.seconds:
        wait()
        start = clock()
        work()
        wait()
        taken = clock() - start
        if runs >= 0:
            best, spent = min(best, taken), spent + taken
        runs += 1
        if runs >= 1000:
            break
    return 1e9 * best / request.frames


def answer(request: Request, works: Mapping[str, Work]) -> dict[str, float | str]:
    """By operation: nanoseconds per frame, or why there are none."""
    torch.set_num_threads(request.threads)
    found: dict[str, float | str] = {}
    with torch.no_grad():
        for name, work in works.items():
            try:
                found[name] = nanoseconds(work, request)
            except Exception as error:  # a library may fail in any way: that is its row
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def main(build: Callable[[Request], Mapping[str, Work]]) -> None:
    """Entry of a script: the request's path is the only argument."""
    with open(sys.argv[1]) as source:
        request = Request(**json.load(source))
    torch.set_num_threads(request.threads)
    print(json.dumps(answer(request, build(request))), flush=True)
