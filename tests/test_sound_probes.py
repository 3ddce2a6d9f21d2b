"""Whatever judges windows outside of a steered encoder reads the same mean of sound as one."""

from dataclasses import replace

import numpy as np
import torch
from tiny import audio, frame_gate

from calibration.activations import encode_windows, window_mels
from whisper_steer.comparison import scores_of_windows
from whisper_steer.gate import Gate
from whisper_steer.passing import padding_frames


def sound_gate() -> Gate:
    gate = frame_gate(1)
    direction = torch.randn(gate.d_model, generator=torch.Generator().manual_seed(3)) / 10
    return replace(gate, sound_probes=(replace(gate.probes[0], coef=direction),))


def test_a_comparison_scores_windows_by_what_sounds(tiny_whisper):
    gate, samples = sound_gate(), np.asarray(audio(1, 5))
    mels = window_mels(samples, tiny_whisper.dims.n_mels)
    streams = {1: encode_windows(tiny_whisper, mels, [1])[0]}
    logits = gate.frame_logits(streams)
    expected = gate.window_logit(logits, streams, padding_frames(mels))
    (score,) = scores_of_windows(tiny_whisper, samples, [0], gate).values()
    assert abs(score - float(torch.sigmoid(expected.double())[0])) < 1e-4
    assert abs(score - float(torch.sigmoid(gate.window_logit(logits, streams).double())[0])) > 1e-3


def test_the_benchmark_scores_clips_by_what_sounds(tiny_whisper, monkeypatch):
    from types import SimpleNamespace

    from benchmarks import measuring
    from benchmarks.peers import ours

    gate = sound_gate()
    monkeypatch.setattr(ours, "steering_of", lambda setup: SimpleNamespace(gate=gate))
    clip = SimpleNamespace(id="c", load=lambda: np.asarray(audio(1, 5)))
    setup = SimpleNamespace(model=tiny_whisper, progress=False)
    found = measuring.gate_scores(setup, {"set": [(clip, None)]})
    (score,) = scores_of_windows(tiny_whisper, clip.load(), [0], gate).values()
    assert abs(found["c"] - score) < 1e-4
