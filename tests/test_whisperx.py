"""WhisperX over a steered faster-whisper model: it decodes in batches, with a model class of its own.

Skipped where WhisperX is not installed; it asks for an exact PyTorch, so it wants an environment of its own:
`pip install whisperx whisper-steer pytest`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_models import clip, mini_ct2

import whisper_steer
from whisper_steer.faster import WhisperModel
from whisper_steer.steering import Shift, Steering

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about optional parts that it does without
    whisperx = pytest.importorskip("whisperx.asr", reason="pip install whisperx", exc_type=ImportError)

SPOKEN = " No, Sarah did not cover the little cat. Who has a blue coat?"
INVENTED = " Thank you for watching."
CLIPS = ("noise", "speech", "music")
AUDIO = np.concatenate([clip(name) for name in CLIPS])
ENDS = [float(end) for end in np.cumsum([len(clip(name)) for name in CLIPS]) / 16000]


class Everything(whisperx.Vad):
    """Finds speech everywhere, a stretch per clip: what is tested is what comes behind voice detection."""

    def __init__(self) -> None:
        super().__init__(0.5)

    @staticmethod
    def preprocess_audio(audio: np.ndarray) -> np.ndarray:
        return audio

    @staticmethod
    def merge_chunks(segments: list[dict[str, float]], *args: Any, **kwargs: Any) -> list[dict[str, float]]:
        return segments

    def __call__(self, audio: dict[str, Any]) -> list[dict[str, float]]:
        return [{"start": a, "end": b} for a, b in zip([0.0, *ENDS], ENDS, strict=False)]


def load(folder: Path, model: Any = None) -> Any:
    return whisperx.load_model(
        str(folder),
        "cpu",
        compute_type="float32",
        language="en",
        vad_model=Everything(),
        threads=1,
        model=model,
    )


def texts(pipeline: Any, batch_size: int = 3) -> list[str]:
    return [segment["text"] for segment in pipeline.transcribe(AUDIO, batch_size=batch_size)["segments"]]


def test_its_model_is_steered_and_set_free_again() -> None:
    pipeline = load(mini_ct2())
    kinds = type(pipeline.model), type(pipeline.model.model)
    with whisper_steer.steer(pipeline.model, files=mini_ct2(), decode_withheld=True) as handle:
        result = pipeline.transcribe(AUDIO, batch_size=3)["segments"]
        assert [segment["text"] for segment in result] == ["", SPOKEN, ""]
        assert [round(segment["end"], 3) for segment in result] == [round(end, 3) for end in ENDS]
        assert result[0]["avg_logprob"] == 0.0 and -1 < result[1]["avg_logprob"] < 0
        assert texts(pipeline, 1) == ["", SPOKEN, ""]
        assert [record.text for record in handle.withheld] == [INVENTED.strip()] * 4
        handle.alpha = 0
        assert texts(pipeline) == [INVENTED, SPOKEN, INVENTED]
    assert (type(pipeline.model), type(pipeline.model.model)) == kinds


def test_our_class_in_its_pipeline() -> None:
    class Both(whisperx.WhisperModel, WhisperModel):
        """WhisperX's batches over our model."""

    model = Both(str(mini_ct2()), device="cpu", cpu_threads=1, alpha=1.0, decode_withheld=True)
    assert texts(load(mini_ct2(), model)) == ["", SPOKEN, ""]
    assert [record.text for record in model.withheld] == [INVENTED.strip()] * 2


def test_a_baked_folder_is_its_live_shift(tmp_path: Path) -> None:
    vector = torch.randn(192, generator=torch.Generator().manual_seed(5))
    steering = Steering((Shift(2, vector, 3.0),), None)
    baked = whisper_steer.bake(mini_ct2(), steering=steering, out=tmp_path / "baked")
    live = load(mini_ct2())
    with whisper_steer.steer(live.model, files=mini_ct2(), steering=steering):
        expected = live.transcribe(AUDIO, batch_size=3)["segments"]
    found = load(baked.path).transcribe(AUDIO, batch_size=3)["segments"]
    assert [segment["text"] for segment in found] == [segment["text"] for segment in expected]
    scores = [[segment["avg_logprob"] for segment in segments] for segments in (found, expected)]
    assert np.abs(np.subtract(*scores)).max() < 1e-5
    plain = load(mini_ct2()).transcribe(AUDIO, batch_size=3)["segments"]
    assert scores[0] != [segment["avg_logprob"] for segment in plain]
