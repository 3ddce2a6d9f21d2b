"""What an SAE is worth, measured on audio it was not trained on: sparsity, error, alive latents, recognition.

Every number is over frames that hold audio (padding excluded), speech and non-speech clips apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.activations import AudioClip, iterate_windows
from calibration.decoding import transcribe_clips
from calibration.evaluate import SpeechMetrics, speech_metrics
from whisper_steer.sae import SparseAutoencoder

if TYPE_CHECKING:
    from whisper.model import Whisper

_CHUNK = 8192  # frames encoded at once: bounds the memory of dense codes


@dataclass(frozen=True)
class DomainQuality:
    """One SAE on the frames of one domain.

    Attributes:
        frames: number of frames measured.
        l0: active latents per frame.
        fvu: squared error / variance of the activations (0 is perfect, 1 is predicting the mean).
        alive: share of latents that are active in at least one of the frames.
    """

    frames: int
    l0: float
    fvu: float
    alive: float


def collect_frames(
    model: Whisper, clips: Iterable[AudioClip], max_frames: int, *, per_clip: int = 400, batch: int = 8
) -> Tensor:
    """Activations (layers, frames, d_model) of the clips' first windows, padding left out, at most
    `max_frames`, and at most `per_clip` of each clip, evenly spread: long clips must not drown the others.
    """
    kept: list[Tensor] = []
    total = 0
    for activations, n_true in iterate_windows(model, (clip.load() for clip in clips), batch=batch):
        n = min(n_true, per_clip, max_frames - total)
        kept.append(activations[:, torch.linspace(0, max(n_true - 1, 0), n).long()])
        total += n
        if total >= max_frames:
            break
    if not kept:
        return torch.empty(model.dims.n_audio_layer, 0, model.dims.n_audio_state)
    return torch.cat(kept, dim=1)


@torch.no_grad()
def calibrate_threshold(sae: SparseAutoencoder, x: Tensor, target_l0: float) -> float:
    """Set one threshold for all latents so that `target_l0` latents are active per frame of x (frames,
    d_model).

    The training form keeps exactly k per frame on average over a batch; the running mean of its smallest
    kept value drifts behind the weights, so the stored threshold is measured again on held-out audio.
    Returns it.
    """
    wanted = round(target_l0 * len(x))
    # the largest `wanted` values of all chunks, found without holding every pre-activation
    largest = np.zeros(0, dtype=np.float32)
    for start in range(0, len(x), _CHUNK):
        pre = sae.pre_activations(x[start : start + _CHUNK]).numpy().ravel()
        floor = largest.min() if len(largest) == wanted and wanted else 0.0
        largest = np.concatenate([largest, pre[pre > floor]])
        if len(largest) > wanted + 1:
            largest = np.partition(largest, len(largest) - wanted - 1)[-wanted - 1 :]
    # codes survive if pre > theta: theta is the largest value that must go
    theta = float(largest.min()) if len(largest) > wanted else 0.0
    sae.theta.fill_(theta)
    return theta


@torch.no_grad()
def domain_quality(sae: SparseAutoencoder, x: Tensor) -> DomainQuality:
    """Measure an SAE on activations x (frames, d_model)."""
    if len(x) == 0:
        return DomainQuality(0, float("nan"), float("nan"), float("nan"))
    active = torch.zeros(sae.n_latents, dtype=torch.bool)
    count, error = 0, 0.0
    for start in range(0, len(x), _CHUNK):
        chunk = x[start : start + _CHUNK]
        codes = sae.encode(chunk)
        count += int((codes > 0).sum())
        active |= (codes > 0).any(dim=0)
        error += float((sae.decode(codes) - chunk).double().square().sum())
    variance = float((x - x.mean(dim=0)).double().square().sum())
    return DomainQuality(len(x), count / len(x), error / max(variance, 1e-12), float(active.float().mean()))


@torch.no_grad()
def active_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """(n_latents,) bool: active in at least one frame of x (frames, d_model)."""
    active = torch.zeros(sae.n_latents, dtype=torch.bool)
    for start in range(0, len(x), _CHUNK):
        active |= (sae.encode(x[start : start + _CHUNK]) > 0).any(dim=0)
    return active


@contextmanager
def spliced(model: Whisper, sae: SparseAutoencoder) -> Iterator[None]:
    """Inside the `with`, the SAE's reconstruction replaces the output of its encoder block."""

    def replace_output(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return sae(output)

    handle = list(model.encoder.blocks)[sae.layer].register_forward_hook(replace_output)
    try:
        yield
    finally:
        handle.remove()


def recognition(model: Whisper, audios: Sequence[np.ndarray], texts: Sequence[str]) -> SpeechMetrics:
    """WER of `whisper.transcribe` as the model stands (with whatever is spliced in)."""
    return speech_metrics(texts, [transcript.text for transcript in transcribe_clips(model, audios)])


def quality_record(
    sae: SparseAutoencoder,
    speech: Tensor,
    nonspeech: Tensor,
    plain: SpeechMetrics | None,
    with_reconstruction: SpeechMetrics | None,
) -> dict[str, Any]:
    """One layer's entry of the report; frames (frames, d_model) of either domain, metrics None where not
    measured.
    """
    either = active_latents(sae, speech) | active_latents(sae, nonspeech)
    record: dict[str, Any] = {
        "layer": sae.layer,
        "activation": sae.activation,
        "n_latents": sae.n_latents,
        "k": sae.k,
        "theta": float(sae.theta.mean()),
        "speech": asdict(domain_quality(sae, speech)),
        "nonspeech": asdict(domain_quality(sae, nonspeech)),
        "alive": float(either.float().mean()),
    }
    for name, metrics in (("wer_plain", plain), ("wer_spliced", with_reconstruction)):
        if metrics is not None:
            record[name] = {"clips": metrics.clips, **asdict(metrics.wer)}
    return record
