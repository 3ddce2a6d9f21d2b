"""What every training script of this folder shares: read the request, time the steps, save the SAE.

A script is started by path in its library's own environment, where whisper_steer is not installed: this
file needs numpy, torch and safetensors alone. The request is one JSON file, the answer one JSON line, the
last one on stdout.

Timed is the training step alone: batches are in memory (on the device) before the clock starts. Peak memory
is the largest resident size during training minus the resident size before the library's trainer was built,
data included in the latter; on CUDA, what the allocator held at most above what it held then.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Request:
    """One training run.

    Attributes:
        frames: .npy file (N, d_model) float32; batch i is its rows i * batch ..., from the start again
            behind the end.
        variant: the library's own variant to train.
        steps: optimiser steps in all, of which the first `untimed` are left out of the clock.
        lr: peak learning rate; after `warmup` steps, falling linearly to 0 over the last `decay` steps
            where the library can.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        out: where the trained SAE goes (safetensors).
    """

    frames: str
    variant: str
    n_latents: int
    k: int
    batch: int
    steps: int
    untimed: int
    lr: float
    warmup: int
    decay: int
    dtype: str
    device: str
    threads: int
    seed: int
    out: str


@dataclass(frozen=True)
class Weights:
    """A trained SAE in the common form: codes = select(relu(W_enc x + b_enc)), x^ = codes W_dec + b_dec.

    W_enc and W_dec (n_latents, d_model), b_enc (n_latents,), b_dec (d_model,).
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class Trainee(Protocol):
    """One library's SAE and trainer."""

    def step(self, index: int, x: Tensor) -> object:
        """One optimiser step on activations x (batch, d_model)."""
        ...

    def weights(self) -> Weights: ...


def resident_bytes() -> int:
    """Resident memory now; the largest so far where the system does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _batches(frames: Tensor, batch: int, steps: int) -> Iterator[Tensor]:
    per_pass = len(frames) // batch
    for index in range(steps):
        start = index % per_pass * batch
        yield frames[start : start + batch]


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _first_use(device: str) -> None:
    """Loads what torch loads at its first optimiser step (over 100 MB), so that it counts for nobody."""
    parameter = torch.nn.Parameter(torch.ones(4, 4, device=device))
    optimizer = torch.optim.Adam([parameter])
    (parameter @ parameter).sum().backward()
    optimizer.step()


def train(request: Request, build: Callable[[Request, int], Trainee]) -> dict[str, float]:
    """Run the request. build: gets the request and d_model, gives the trainee."""
    torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    frames = torch.from_numpy(np.load(request.frames)).to(request.device)
    _first_use(request.device)
    on_cuda = request.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_cuda else resident_bytes()
    trainee = build(request, frames.shape[1])
    seconds = []
    for index, x in enumerate(_batches(frames, request.batch, request.steps)):
        _synchronise(request.device)
        start = time.perf_counter()
        trainee.step(index, x)
        _synchronise(request.device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_cuda else peak_resident_bytes()
    found = trainee.weights()
    tensors = {field.name: getattr(found, field.name).detach().float().cpu() for field in fields(found)}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, request.out)
    timed = seconds[request.untimed :]
    return {
        "step_s": statistics.median(timed),
        "step_s_mean": statistics.fmean(timed),
        "peak_mb": max(0, peak - before) / MEBIBYTE,
    }


def main(build: Callable[[Request, int], Trainee]) -> None:
    """Entry of a script: the request's path is the only argument."""
    with open(sys.argv[1]) as source:
        request = Request(**json.load(source))
    answer = train(request, build)
    print(json.dumps(answer), flush=True)
