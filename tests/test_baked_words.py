"""The bundled model writes the same words with a shift in its weights as with the shift attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from faster_models import clip

import whisper_steer
from whisper_steer.backends import make_backend
from whisper_steer.steering import Shift, Steering

CLIPS = ("speech", "noise", "music")
BACKENDS = {"openai": "openai", "transformers": "transformers", "ct2": "faster"}


@pytest.mark.parametrize("format", BACKENDS)
def test_baked_is_attached(tmp_path: Path, format: str) -> None:
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    vector = torch.randn(192, generator=torch.Generator().manual_seed(0))
    steering = Steering((Shift(2, vector, 15.0),))
    suffix = ".pt" if format == "openai" else ""
    path = whisper_steer.convert("mini.en", format, tmp_path / f"plain{suffix}")
    baked = whisper_steer.bake(path, steering=steering, out=tmp_path / f"baked{suffix}").path
    options: dict[str, Any] = {"temperature": 0.0, "condition_on_previous_text": False}
    if format == "ct2":
        options["beam_size"] = 1

    def words(model: Path, **steered: Any) -> list[str]:
        backend = make_backend(BACKENDS[format], str(model), device="cpu", **steered)
        return [backend.transcribe(clip(name), options)["text"].strip() for name in CLIPS]

    plain, attached = words(path, alpha=0), words(path, alpha=1.0, steering=steering)
    assert words(baked, alpha=0) == attached != plain
