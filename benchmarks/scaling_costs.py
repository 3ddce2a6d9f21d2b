"""Arithmetic of large runs: frames, bytes, floating-point operations, traffic. Nothing here is measured.

Sizes are in bytes, times in seconds, audio in hours; a frame is 20 ms of audio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibration.activations import MAX_FRAMES
from calibration.frame_cache import FRAMES_PER_HOUR

WINDOWS_PER_HOUR = 120  # of 30 s


@dataclass(frozen=True)
class Job:
    """One SAE for each of `layers` layers, trained once over `hours` of audio."""

    hours: float
    layers: int
    d_model: int
    n_latents: int
    k: int
    batch: int

    @property
    def frames(self) -> int:
        return round(self.hours * FRAMES_PER_HOUR)

    @property
    def steps(self) -> int:
        return math.ceil(self.frames / self.batch)


# AudioSAE (arXiv 2602.05027): Whisper-small, 8x, k 50, about 2,800 h; 2,504 is the least multiple of 8
# processes that is not below its batch of 2,500
PAPER = Job(2800, 12, 768, 6144, 50, 2504)


@dataclass(frozen=True)
class Gpu:
    """flops: dense bfloat16 products with float32 sums per second, by the vendor's data sheet."""

    name: str
    flops: float


GPUS = (Gpu("RTX 3090", 71e12), Gpu("A100", 312e12), Gpu("H100 SXM", 989e12))
UTILISATION = (0.05, 0.30)  # share of `Gpu.flops` reached in the estimates
PUBLISHED_SAE_TOKENS = 333_000  # dictionary_learning: 24 SAEs x 50 M tokens in about 1 h on an RTX 3090


# ---------- floating-point operations


def encoder_flop(d_model: int, layers: int, positions: int = MAX_FRAMES) -> int:
    """One window through a Whisper's blocks: 12 d^2 weights a block and position, and attention's two
    products; without the two convolutions (2 % of whisper-small)."""
    return layers * (24 * d_model**2 * positions + 4 * positions**2 * d_model)


def training_flop(d_model: int, n_latents: int) -> int:
    """A frame in a dense training step: two products forward, three backward (none for the input)."""
    return 10 * d_model * n_latents


def job_flop(job: Job) -> tuple[int, int]:
    """(encoding in full windows, training of all SAEs)."""
    windows = round(job.hours * WINDOWS_PER_HOUR)
    return (
        windows * encoder_flop(job.d_model, job.layers),
        job.frames * job.layers * training_flop(job.d_model, job.n_latents),
    )


# ---------- memory and disk


def sae_parameters(d_model: int, n_latents: int) -> int:
    """W_enc, W_dec, b_enc, b_dec."""
    return 2 * d_model * n_latents + n_latents + d_model


def training_bytes(d_model: int, n_latents: int) -> int:
    """One SAE in training: float32 weights, gradients and Adam's two moments."""
    return 16 * sae_parameters(d_model, n_latents)


def checkpoint_bytes(d_model: int, n_latents: int) -> int:
    """One SAE in a checkpoint, which needs no gradients: float32 weights and moments, and an int64 count of
    unused frames for every latent; without a few kilobytes of names and settings."""
    return 12 * sae_parameters(d_model, n_latents) + 8 * n_latents


def buffer_bytes(batch: int, buffer_batches: int, layers: int, d_model: int, value_bytes: int = 2) -> int:
    """The buffer in use and the one that is being filled, over all processes."""
    return 2 * batch * buffer_batches * layers * d_model * value_bytes


def cache_bytes(hours: float, layers: int, d_model: int, value_bytes: int = 2) -> int:
    """Frames of all layers on disk."""
    return round(hours * FRAMES_PER_HOUR) * layers * d_model * value_bytes


# ---------- several processes


def largest_share(saes: int, processes: int) -> int:
    """SAEs of the process that has most of them, with --split saes: the others wait for it."""
    owners = [position * processes // saes for position in range(saes)]
    return max(owners.count(owner) for owner in set(owners))


def gradients_payload(job: Job, processes: int) -> dict[str, int]:
    """What a process hands over per step with --split gradients, one SAE a layer: the float32 gradients, for
    which BatchTopK's largest k x B codes of all are found first, and a byte a latent: active or not.

    The candidates are counted as the codes that are kept; up to half as many again are sent.
    """
    return {
        "gradients": 4 * job.layers * sae_parameters(job.d_model, job.n_latents),
        "candidates": 4 * job.layers * job.k * job.batch // processes,
        "flags": job.layers * job.n_latents,
    }


def gradients_traffic(job: Job, processes: int) -> float:
    """Bytes that each process sends (and receives) per step with --split gradients: a ring's all-reduce sends
    a payload 2 (p - 1) / p times, its all-gather p - 1 times."""
    payload = gradients_payload(job, processes)
    reduced = 2 * (processes - 1) / processes * (payload["gradients"] + payload["flags"])
    return reduced + (processes - 1) * payload["candidates"]


def saes_traffic(job: Job, processes: int, value_bytes: int = 2) -> tuple[float, float]:
    """(bytes in all, bytes received by the busiest process) per step with --split saes, one SAE a layer:
    every layer's frames go to the owner of its SAE, which has its own part of them already."""
    layer = job.batch * job.d_model * value_bytes * (processes - 1) / processes
    return job.layers * layer, largest_share(job.layers, processes) * layer


# ---------- time


@dataclass(frozen=True)
class Speed:
    """What was measured on one device.

    Attributes:
        audio: seconds to decode and prepare an hour of windows; beside a GPU the CPU does it meanwhile, so
            0 there.
        encode: seconds to encode an hour of windows, all layers.
        train: seconds of a step of one SAE on the whole batch; part: on a process's part of it.
        filled: share (0..1] of the windows' frames that are not padding.
    """

    audio: float
    encode: float
    train: float
    part: float
    filled: float


def seconds_alone(job: Job, speed: Speed) -> tuple[float, float]:
    """(encoding with its audio, training) on one device."""
    return (
        job.hours / speed.filled * (speed.audio + speed.encode),
        job.steps * job.layers * speed.train,
    )


def seconds_shared(job: Job, speed: Speed, processes: int, split: str) -> tuple[float, float]:
    """The same on several equal devices, without the traffic."""
    encoding = job.hours / processes / speed.filled * (speed.audio + speed.encode)
    if split == "gradients":
        return encoding, job.steps * job.layers * speed.part
    return encoding, job.steps * largest_share(job.layers, processes) * speed.train


def estimated_seconds(job: Job, flops: float, utilisation: float, processes: int = 1) -> float:
    """From operations alone; several processes: --split saes, without the traffic."""
    encoding, training = job_flop(job)
    share = largest_share(job.layers, processes) / job.layers
    return (encoding / processes + training * share) / (flops * utilisation)
