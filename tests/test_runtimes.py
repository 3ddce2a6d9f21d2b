"""The bundled model in four runtimes: the same words over speech, greedy, plain and steered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faster_models import CPU, clip, mini_ct2

import whisper_steer
from whisper_steer.faster import WhisperModel

GREEDY = {"temperature": 0.0, "condition_on_previous_text": False}
SPOKEN = "no sarah did not cover the little cat who has a blue coat"


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+", text.lower()))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_openai_and_faster(alpha: float) -> None:
    model = WhisperModel(str(mini_ct2()), alpha=alpha, **CPU)
    there = whisper_steer.transcribe(clip("speech"), model, beam_size=1, **GREEDY)
    here = whisper_steer.transcribe(clip("speech"), "mini.en", alpha=alpha, device="cpu", **GREEDY)
    assert words(there.text) == words(here.text) == SPOKEN


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_transformers(alpha: float) -> None:
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    found = whisper_steer.transcribe(
        clip("speech"), "mini.en", alpha=alpha, device="cpu", backend="transformers", **GREEDY
    )
    assert words(found.text) == SPOKEN


def test_whisper_cpp(tmp_path: Path) -> None:
    pywhispercpp = pytest.importorskip("pywhispercpp.model", reason="pip install pywhispercpp")
    path = whisper_steer.convert("mini.en", "ggml", tmp_path / "mini.en.bin")
    model = pywhispercpp.Model(
        str(path), n_threads=1, temperature_inc=0.0, print_progress=False, print_realtime=False
    )
    assert words(" ".join(segment.text for segment in model.transcribe(clip("speech")))) == SPOKEN
