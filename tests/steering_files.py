"""Hand-made steerings and model files for tests of the user-facing parts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_DIMS, make_tiny_whisper
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram
from whisper.model import Whisper

from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Gate, Probe, Shift, Steering


def brief_whisper(seed: int = 0) -> Whisper:
    """Named "tiny"; writes 8 tokens at most per window (half its text context), which keeps tests quick where
    that cannot be asked for by an option."""
    model = make_tiny_whisper(seed, replace(TINY_DIMS, n_text_ctx=16))
    model.name = "tiny"
    return model


def raw_gate(coef: torch.Tensor, intercept: float, *, layer: int = 1) -> Gate:
    """A gate whose frame logit is coef . x + intercept, unsmoothed, withholding above 0."""
    d = len(coef)
    probe = Probe(layer, "raw", coef, mean=torch.zeros(d), std=torch.ones(d))
    return Gate((probe,), intercept, smooth=1, threshold=0.0, spread=0.0, frame_scale=1.0, frame_bias=0.0)


def constant_steering(model: Whisper, logit: float, *, strength: float = 3.0, name: str = "test") -> Steering:
    """Withholds every window if logit > 0, none otherwise; its shift changes the words."""
    d = model.dims.n_audio_state
    direction = torch.randn(d, generator=torch.Generator().manual_seed(0))
    gate = raw_gate(torch.zeros(d), logit)
    metadata = {**model_metadata(model), "name": name, "rates": {"text_fpr": 0.25}}
    return Steering((Shift(2, direction, strength),), gate, metadata)


def separating_steering(model: Whisper, samples: Any, *, speech: int, silence: int) -> Steering:
    """Withholds windows of `samples` like number `silence`, not ones with a frame like the beginning of
    number `speech`."""
    layer, found = 1, []
    mel = log_mel_spectrogram(samples, padding=N_SAMPLES)
    hook = model.encoder.blocks[layer].register_forward_hook(lambda *args: found.append(args[2][0]))
    with torch.no_grad():
        for window in (speech, silence):
            model.encoder(mel[None, :, window * N_FRAMES : (window + 1) * N_FRAMES])
    hook.remove()
    centres = [found[0][10:100].mean(0), found[1].mean(0)]
    coef = centres[1] - centres[0]
    coef = 10 * coef / coef.norm() ** 2  # the centres are 10 apart
    intercept = -float(coef @ (centres[0] + centres[1])) / 2
    metadata = {**model_metadata(model), "name": "separating"}
    return Steering((), raw_gate(coef, intercept, layer=layer), metadata)


def save_checkpoint(model: Whisper, path: Path) -> Path:
    """openai-whisper's own .pt format."""
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, path)
    return path
