"""What the tests of the trade-off benchmark share: clips, a tiny model, and a method that says one thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import make_tiny_whisper
from whisper.model import ModelDimensions, Whisper

from benchmarks.hearing_cache import ClipRecord, HearingCache, clip_record
from benchmarks.listening import PlainWhisper
from benchmarks.methods import Heard, Setup, Unavailable
from benchmarks.rows import Measured
from calibration.corpus import Clip
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Shift, Steering

RATE = 16_000


def clip(name: str, kind: str = "speech", text: str | None = None, path: str | None = None) -> Clip:
    tone = np.sin(np.arange(RATE) * 0.05).astype(np.float32) * 0.1
    return Clip(name, kind, name.split("/")[0], "test", text, name, path=path, audio=lambda: tone)


def measured(
    item: Clip, text: str, *, nsp: bool | None = True, hr: bool | None = True, seconds: float = 2.0
) -> Measured:
    """A clip of 30 s in which `text` was heard."""
    record = ClipRecord(
        item.id, 7, item.category, item.kind, item.category, item.text, 30.0, item.path, "made", None,
        group=item.group,
    )  # fmt: skip
    return Measured(record, Heard(text, (), nsp, hr, seconds))


def prepared(*clips: Clip) -> dict[str, list[tuple[Clip, ClipRecord]]]:
    """The clips by set, with their records."""
    sets: dict[str, list[tuple[Clip, ClipRecord]]] = {}
    for item in clips:
        sets.setdefault(item.category, []).append((item, clip_record(item, item.category, item.load())))
    return sets


def small_whisper() -> Whisper:
    """Random weights; a text context of 16 tokens keeps its endless sentences short."""
    model = make_tiny_whisper(dims=ModelDimensions(80, 1500, 64, 1, 2, 51864, 16, 64, 1, 1))
    model.name = "tiny-random"
    return model


def shift_for(model: Whisper, name: str) -> Steering:
    direction = torch.linspace(-1, 1, model.dims.n_audio_state)
    return Steering((Shift(1, direction, 5.0),), None, {"name": name, **model_metadata(model)})


def setup_for(model: Whisper, folder: Path, steering: Path | None = None) -> Setup:
    plain = PlainWhisper(model, HearingCache(folder), "weights")
    return Setup(
        model, "tiny-random", folder / "fitted", plain.heard, plain.windows,
        progress=False, steering=None if steering is None else str(steering),
    )  # fmt: skip


class Says:
    """A method that says one thing, and counts what it was asked."""

    about = "says one thing"

    def __init__(self, name: str, text: str, strengths: tuple[float, ...] = (1.0,), reason: str = "") -> None:
        self.name, self.text, self.strengths, self.reason = name, text, strengths, reason
        self.asked: list[tuple[float, list[str]]] = []
        self.fails_after = 10**6

    def prepare(self, setup: Setup) -> None:
        if self.reason:
            raise Unavailable(self.reason)

    def hear(self, setup: Setup, strength: float, clips: list[Clip]) -> object:
        self.asked.append((strength, [item.id for item in clips]))
        for number, _ in enumerate(clips):
            if number == self.fails_after:
                raise KeyboardInterrupt
            yield Heard(self.text, (), True, None, 0.5)
