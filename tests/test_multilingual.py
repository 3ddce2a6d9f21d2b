"""Steering on in multilingual models: the language is detected from the edited stream, alike in all runtimes,
and a window that is withheld gives no words, whatever its language."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_DIMS, make_tiny_whisper
from faster_models import CPU
from tiny import audio, frame_gate, latents, mel, says, shift
from whisper.audio import N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.model import Whisper
from whisper.tokenizer import LANGUAGES

import whisper_steer
from whisper_steer.convert import convert
from whisper_steer.faster import BatchedInferencePipeline, WhisperModel
from whisper_steer.steering import Steering

pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")

STEERINGS = {"shift": Steering((shift(1, 3.0),)), "gated latents": Steering((latents(2),), frame_gate(1))}
BRIEF = {"beam_size": 1, "temperature": 0.0, "max_new_tokens": 4, "without_timestamps": True}


@pytest.fixture(scope="module")
def openai() -> Whisper:
    made = make_tiny_whisper(2, replace(TINY_DIMS, n_vocab=51865))
    made.name = "tiny"
    return made


@pytest.fixture(scope="module")
def folder(openai: Whisper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(openai, "ct2", tmp_path_factory.mktemp("multilingual") / "tiny-ct2")


@pytest.fixture(scope="module")
def hf(openai: Whisper) -> Any:
    from whisper_steer.transformers_model import from_openai

    return from_openai(openai)


def silent(steering: Steering) -> Steering:
    """The same edits; nobody speaks in any window."""
    return replace(steering, gate=says(True))


def words(segments: Any) -> list[tuple[float, str]]:
    return [(segment.start, segment.text) for segment in segments]


# ---------- detect_language


@pytest.mark.parametrize("kind", STEERINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_all_runtimes_detect_the_language_of_the_edited_stream(
    openai: Whisper, folder: Path, hf: Any, kind: str, seed: int
) -> None:
    steering, features = STEERINGS[kind], mel(seed)
    plain = openai.detect_language(features)[1]
    with whisper_steer.steer(openai, steering=steering):
        expected = openai.detect_language(features)[1]
    assert max(abs(expected[code] - plain[code]) for code in LANGUAGES if code in plain) > 1e-3
    model = WhisperModel(str(folder), steering=steering, **CPU)
    language, probability, all_of_them = model.detect_language(features=features.numpy())
    found = dict(all_of_them)
    assert found.keys() == expected.keys()
    assert max(abs(found[code] - expected[code]) for code in expected) < 1e-4
    assert language == max(expected, key=expected.get) and probability == found[language]
    model.alpha = 0
    off = dict(model.detect_language(features=features.numpy())[2])
    assert max(abs(off[code] - plain[code]) for code in plain) < 1e-4
    with whisper_steer.steer(hf, steering=steering), torch.no_grad():
        (token,) = hf.detect_language(input_features=features[None]).tolist()
        start = torch.tensor([[hf.generation_config.decoder_start_token_id]])
        logits = hf(input_features=features[None], decoder_input_ids=start).logits[0, -1]
    languages = hf.generation_config.lang_to_id
    assert token == languages[f"<|{language}|>"]
    theirs = logits[[languages[f"<|{code}|>"] for code in expected]].softmax(-1)
    assert np.abs(theirs.numpy() - np.array(list(expected.values()))).max() < 1e-4


def test_faster_detects_over_withheld_windows_too(folder: Path) -> None:
    """What language it is is asked before anybody knows whether a window is withheld: no record of it."""
    edits = STEERINGS["shift"]
    model = WhisperModel(str(folder), steering=silent(edits), **CPU)
    found = dict(model.detect_language(audio=audio(1, 10))[2])
    expected = dict(WhisperModel(str(folder), steering=edits, **CPU).detect_language(audio=audio(1, 10))[2])
    # the gate is open, but for a hair
    assert max(abs(found[code] - expected[code]) for code in expected) < 2e-3
    assert model.withheld == []


# ---------- transcription without a given language


@pytest.mark.parametrize("multilingual", [False, True])
def test_faster_in_sequence(folder: Path, multilingual: bool) -> None:
    sound, edits = audio(1, 40), STEERINGS["gated latents"]
    options = {**BRIEF, "multilingual": multilingual, "language_detection_threshold": 0.0}
    model = WhisperModel(str(folder), steering=silent(edits), **CPU)
    segments, info = model.transcribe(sound, **options)
    assert words(segments) == []
    assert info.language == model.detect_language(audio=sound)[0]
    assert [(record.start, record.end) for record in model.withheld] == [(0.0, 30.0), (30.0, 40.0)]
    # somebody speaks everywhere: the gate keeps the edits out, and nothing is withheld
    speaking = WhisperModel(str(folder), steering=replace(edits, gate=says(False)), **CPU)
    plain = WhisperModel(str(folder), alpha=0, **CPU)
    ours, theirs = (words(found.transcribe(sound, **options)[0]) for found in (speaking, plain))
    assert ours == theirs != [] and speaking.withheld == []


def test_faster_in_batches(folder: Path) -> None:
    sound = audio(1, 20)
    clips = [{"start": 0.0, "end": 10.0}, {"start": 10.0, "end": 20.0}]
    options = {**BRIEF, "multilingual": True, "clip_timestamps": clips}
    model = WhisperModel(str(folder), steering=silent(STEERINGS["shift"]), **CPU)
    segments, info = BatchedInferencePipeline(model).transcribe(sound, **options)
    assert words(segments) == [] and info.language in LANGUAGES
    assert [(record.start, record.end) for record in model.withheld] == [(0.0, 10.0), (10.0, 20.0)]
    model.alpha = 0
    plain = WhisperModel(str(folder), alpha=0, **CPU)
    ours = BatchedInferencePipeline(model).transcribe(sound, **options)
    theirs = BatchedInferencePipeline(plain).transcribe(sound, **options)
    assert words(ours[0]) == words(theirs[0]) != [] and ours[1].language == theirs[1].language


def test_transformers(hf: Any) -> None:
    features = torch.stack([mel(0), mel(1)])
    options = {"max_new_tokens": 4, "num_beams": 1}
    edits, german = STEERINGS["shift"], {"language": "de", "task": "translate"}
    plain = [hf.generate(features, **asked, **options) for asked in ({}, german)]
    with whisper_steer.steer(hf, steering=edits):
        assert not torch.equal(hf.generate(features, **options), plain[0])
    with whisper_steer.steer(hf, steering=replace(edits, gate=says(False))) as handle:
        found = [hf.generate(features, **asked, **options) for asked in ({}, german)]
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]) and handle.withheld == []
    with whisper_steer.steer(hf, steering=silent(edits), decode_withheld=True) as handle:
        for asked in ({}, german):
            assert bool((hf.generate(features, **asked, **options) == hf.config.pad_token_id).all())
        assert len(handle.withheld) == 4 and all(record.text for record in handle.withheld)


@pytest.mark.parametrize("backend", ["openai", "faster", "transformers"])
def test_transcribe_tells_the_detected_language(openai: Whisper, folder: Path, hf: Any, backend: str) -> None:
    model = {"openai": openai, "faster": str(folder), "transformers": hf}[backend]
    sound, edits = audio(1, 10), STEERINGS["shift"]
    options: dict[str, Any] = {"temperature": 0.0, "backend": backend, "condition_on_previous_text": False}
    if backend == "faster":
        options["device"] = "cpu"
    if backend == "openai":
        options["sample_len"] = 4
    if backend == "faster":  # pads the features of short audio in another way
        expected = WhisperModel(model, steering=edits, **CPU).detect_language(audio=sound)[0]
    else:
        with whisper_steer.steer(openai, steering=edits):
            features = log_mel_spectrogram(pad_or_trim(sound, N_SAMPLES))
            chances = openai.detect_language(features)[1]
            expected = max(chances, key=chances.get)
    found = whisper_steer.transcribe(sound, model, alpha=1.0, steering=edits, **options)
    assert found.language == expected
    assert found.suppressed == ()
    quiet = whisper_steer.transcribe(sound, model, alpha=1.0, steering=silent(edits), **options)
    assert (quiet.text, quiet.segments, len(quiet.suppressed)) == ("", (), 1)
    assert (quiet.suppressed[0].start, quiet.suppressed[0].end) == (0.0, 10.0)
