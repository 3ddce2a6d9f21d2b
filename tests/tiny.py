"""Audio, edits and gates for the tiny random Whisper of conftest.py."""

from __future__ import annotations

import numpy as np
import torch
from test_gate import raw_gate
from test_sae import random_sae
from whisper.decoding import DecodingOptions

from whisper_steer.steering import Gate, LatentEdit, Shift

OPTIONS = DecodingOptions(fp16=False, language="en", sample_len=5)


def mel(seed=0, shape=(80, 3000)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def audio(seed, seconds=40):
    """A warbling tone in faint noise, different for every seed; (n,) float32 at 16 kHz."""
    t = np.arange(16000 * seconds) / 16000
    noise = np.random.default_rng(seed).normal(size=t.size) * 0.01
    return (
        0.3 * np.sin(2 * np.pi * (200 + 137 * seed) * t * (1 + 0.1 * np.sin(t * (seed + 1)))) + noise
    ).astype("f4")


def shift(layer=1, size=1.0, seed=3):
    direction = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return Shift(layer, direction, size)


def latents(layer=1, mode="add"):
    return LatentEdit.from_sae(random_sae(5, d=64, n=40, layer=layer), [3, 8, 30], torch.ones(3), mode=mode)


def frame_gate(layer=0, **changes):
    """Never withholds a window, opens for a part of the frames."""
    coef = torch.randn(64, generator=torch.Generator().manual_seed(4)) * 0.2
    return raw_gate(64, layer=layer, coef=coef, threshold=1e9, **{"intercept": 0.0, **changes})


def says(nobody_speaks: bool, layer=0) -> Gate:
    """A gate that finds nobody speaking in every window, or somebody in every one."""
    return raw_gate(64, layer=layer, coef=torch.zeros(64), intercept=10.0 if nobody_speaks else -10.0)


def outputs(model, features):
    """Encoder output and that of every block."""
    blocks = []
    hooks = [b.register_forward_hook(lambda m, a, out: blocks.append(out)) for b in model.encoder.blocks]
    try:
        return model.encoder(features), blocks
    finally:
        for hook in hooks:
            hook.remove()


def footprint(model):
    """Everything that steering could leave behind."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
    )
    hooks = {n: [len(getattr(m, kind)) for kind in kinds] for n, m in model.named_modules()}
    return hooks, sorted(model.__dict__), sorted(model.encoder.__dict__)


def same_result(a, b):
    assert (a.text, a.tokens, a.avg_logprob, a.no_speech_prob) == (
        b.text,
        b.tokens,
        b.avg_logprob,
        b.no_speech_prob,
    )


def manual(model, features, layers):
    """The encoder written out, with a function per layer applied to the block's output."""
    x = torch.nn.functional.gelu(model.encoder.conv1(features))
    x = torch.nn.functional.gelu(model.encoder.conv2(x)).permute(0, 2, 1) + model.encoder.positional_embedding
    for number, block in enumerate(model.encoder.blocks):
        x = block(x)
        x = layers.get(number, lambda x: x)(x)
    return model.encoder.ln_post(x)
