"""What the calibration tests share: a tiny Whisper that soon stops talking, and clips made on the spot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from conftest import make_tiny_whisper
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

RATE = 16_000
DIMS = ModelDimensions(80, 1500, 32, 1, 2, 51864, 448, 32, 1, 1)


def make_terse_whisper(seed: int = 0, words: int = 3) -> Whisper:
    """A tiny Whisper that ends every text after about `words` tokens, so that decoding is quick."""
    model = make_tiny_whisper(seed, DIMS)
    eot = get_tokenizer(multilingual=False).eot
    with torch.no_grad():
        # late positions point along one direction, and so does the embedding of <|endoftext|>
        direction = torch.nn.functional.normalize(
            torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0
        )
        model.decoder.positional_embedding[words + 1 :] += 60 * direction
        model.decoder.token_embedding.weight[eot] = 2 * direction
    return model


@dataclass(frozen=True)
class FakeClip:
    """Has what calibration reads of a `calibration.corpus.Clip`."""

    id: str
    kind: str
    seconds: float
    text: str | None = None
    speech_intervals: tuple[tuple[float, float], ...] | None = None
    path: str | None = None
    split: str = "calibration"
    group: str = ""

    def load(self) -> np.ndarray:
        return sound(self.id, self.seconds, speech=self.kind != "nonspeech")


def sound(name: str, seconds: float, *, speech: bool) -> np.ndarray:
    """Noise bursts ("speech") or a tone with its own pitch; the same for the same name."""
    rng = np.random.default_rng(sum(name.encode()))
    n = int(seconds * RATE)
    if speech:
        envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * np.arange(n) / RATE)
        return (0.2 * envelope * rng.standard_normal(n)).astype(np.float32)
    return (0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * np.arange(n) / RATE)).astype(np.float32)


def clips(speech: int, nonspeech: int, *, seconds: float = 2.0) -> dict[str, list[FakeClip]]:
    """Sets "speech" and "tones"."""
    return {
        "speech": [
            FakeClip(f"speech/{i}", "speech", seconds, "hello world", ((0.0, seconds),))
            for i in range(speech)
        ],
        "tones": [FakeClip(f"tones/{i}", "nonspeech", seconds) for i in range(nonspeech)],
    }
