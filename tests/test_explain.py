"""What was withheld, what was edited, and by what score; skipping a window changes nothing else."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audio_files import tone, write_wav
from faster_models import CPU, clip, mini_ct2
from steering_files import brief_whisper, constant_steering, save_checkpoint

import whisper_steer
from whisper_steer.cli import main
from whisper_steer.cli.explain import lines, summary
from whisper_steer.faster import BatchedInferencePipeline, WhisperModel
from whisper_steer.passing import edited_stretches
from whisper_steer.steering import Shift, Steering
from whisper_steer.transcribe import Transcript
from whisper_steer.withholding import EditedMarker, Suppressed, collecting, merged
from whisper_steer.zoo import load_model, load_steering

WORDS = "No, Sarah did not cover the little cat. Who has a blue coat?"


# ---------- stretches


def step(gate: list[list[float]] | None, edits: bool = True) -> Any:
    """What edited_stretches looks at in a Step."""
    frame_gate = None if gate is None else torch.tensor(gate)
    return SimpleNamespace(frame_gate=frame_gate, steering=SimpleNamespace(edits=("edit",) if edits else ()))


def test_stretches_of_open_gates() -> None:
    first = step([[0.0, 0.5, 0.02, 0.0, 0.0, 1.0], [0.0] * 6])
    second = step([[0.0, 0.0, 0.0, 0.1, 0.0, 0.0], [1.0] * 6])
    assert edited_stretches([first], 2) == [((0.02, 0.06), (0.1, 0.12)), ()]
    assert edited_stretches([first, second], 2) == [((0.02, 0.08), (0.1, 0.12)), ((0.0, 0.12),)]
    # a gate that only withholds, and edits without a gate
    assert edited_stretches([step([[1.0] * 6] * 2, edits=False), step(None)], 2) == [(), ()]


def test_merged() -> None:
    found = merged([(30.0, 40.0), (1.0, 2.0), (2.0, 2.5), (1.5, 1.7), (34.0, 70.0), (69.0, 69.0)], 35.5)
    assert found == ((1.0, 2.5), (30.0, 35.5))
    assert merged([], 10.0) == () and merged([(12.0, 13.0)], 10.0) == ()


def test_a_marked_temperature_keeps_its_stretches() -> None:
    marker = EditedMarker(0.2, ((0.0, 1.0),))
    for again in (copy.deepcopy(marker), pickle.loads(pickle.dumps(marker))):
        assert again == 0.2 and again.stretches == ((0.0, 1.0),)


# ---------- the words, once and again, in three runtimes


@pytest.fixture(scope="module")
def open_everywhere() -> Steering:
    """The bundled gate; its edit, in every frame of a window that is not withheld, adds nothing."""
    bundled = load_steering("mini.en")
    assert bundled.gate is not None
    gate = replace(bundled.gate, frame_scale=1.0, frame_bias=-1000.0)
    return replace(bundled, edits=(Shift(gate.layer, torch.zeros(192), 1.0),), gate=gate)


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    """A window of noise, then 5.4 s of speech."""
    return np.concatenate([np.resize(clip("noise"), 30 * 16000), clip("speech")])


@pytest.mark.parametrize("backend", ["openai", "faster", "transformers"])
def test_what_is_kept_does_not_hang_on_decoding_the_rest(
    backend: str, sound: np.ndarray, open_everywhere: Steering
) -> None:
    if backend == "transformers":
        pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    model: Any = str(mini_ct2()) if backend == "faster" else load_model("mini.en", device="cpu")
    if backend == "transformers":
        from whisper_steer.transformers_model import from_openai

        model = from_openai(model)
    options: dict[str, Any] = {"backend": backend, "steering": open_everywhere, "temperature": 0.0}
    options |= {"device": "cpu"} if backend == "faster" else {}
    options |= {"word_timestamps": True, "condition_on_previous_text": False, "beam_size": 1}
    decoded, skipped = (
        whisper_steer.transcribe(sound, model, decode_withheld=known, **options) for known in (True, False)
    )
    assert skipped.text.strip() == WORDS and skipped.text == decoded.text
    for ours, theirs in zip(skipped.segments, decoded.segments, strict=True):
        assert (ours.start, ours.end, ours.tokens, ours.seek) == (
            theirs.start,
            theirs.end,
            theirs.tokens,
            theirs.seek,
        )
        assert [(w.word, w.start, w.end) for w in ours.words or ()] == [
            (w.word, w.start, w.end) for w in theirs.words or ()
        ]
    (window,), (known,) = skipped.suppressed, decoded.suppressed
    assert (window.start, window.end, window.text) == (0.0, 30.0, None)
    assert (known.start, known.end) == (0.0, 30.0) and "watching" in (known.text or "")
    assert window.logit is not None and window.threshold is not None and window.logit > window.threshold
    assert window.score == pytest.approx(1 / (1 + np.exp(-window.logit)))
    assert (window.no_speech_prob, window.avg_logprob) == (None, None)
    assert skipped.edited == decoded.edited == ((30.0, pytest.approx(len(sound) / 16000, abs=0.03)),)


def test_batches_tell_what_was_edited(open_everywhere: Steering) -> None:
    audio = np.concatenate([clip("noise"), clip("speech"), clip("noise")])
    clips = [{"start": 0.0, "end": 8.0}, {"start": 8.0, "end": 13.38}, {"start": 13.39, "end": 21.38}]
    model = WhisperModel(str(mini_ct2()), steering=open_everywhere, **CPU)
    with collecting(model) as collector:
        segments, _ = BatchedInferencePipeline(model).transcribe(audio, clip_timestamps=clips)
        assert "".join(segment.text for segment in segments).strip() == WORDS
    assert [record.text for record in collector.records] == [None, None]
    assert collector.edited == [(8.0, pytest.approx(13.38, abs=0.03))]


def test_edits_without_a_gate_are_everywhere_and_alpha_0_edits_nothing() -> None:
    model, sound = brief_whisper(), tone(2.0)
    steering = replace(constant_steering(model, -1.0), gate=None)
    assert whisper_steer.transcribe(sound, model, steering=steering, temperature=0.0).edited == ((0.0, 2.0),)
    with whisper_steer.steer(model, alpha=0, steering=steering):
        assert whisper_steer.transcribe(sound, model, temperature=0.0).edited == ()
    gate_alone = replace(constant_steering(model, -1.0), edits=())
    assert whisper_steer.transcribe(sound, model, steering=gate_alone, temperature=0.0).edited == ()


# ---------- in words


def test_lines_and_sums() -> None:
    skipped = Suppressed(0.0, 30.0, None, 0.9931, None, None, 4.967, 0.5)
    known = Suppressed(40.0, 45.5, " Thank you. ", 0.75, 0.3, -0.2, 1.1, 0.5)
    bare = Suppressed(None, None, "", 0.6, None, None)
    transcript = Transcript(
        "", (), "en", 60.0, (skipped, known, bare), "m", "s", 1.0, edited=((30.5, 31.0), (50.0, 52.25))
    )
    assert summary(transcript) == (
        "3 windows withheld, decoding saved for 30.0 of 60.0 s; stream edited in 2.8 s of the rest"
    )
    assert lines(transcript) == [
        "0.00-30.00 s  withheld: gate logit 4.97 > threshold 0.50, nobody speaks with probability 0.9931; "
        "not decoded, saved for 30.0 s",
        "time unknown  withheld: nobody speaks with probability 0.6000; decoded on request: no words",
        "30.50-31.00 s  stream edited",
        "40.00-45.50 s  withheld: gate logit 1.10 > threshold 0.50, nobody speaks with probability 0.7500; "
        'decoded on request: "Thank you."',
        "50.00-52.25 s  stream edited",
    ]
    value = transcript.to_dict()
    assert value["edited"] == [[30.5, 31.0], [50.0, 52.25]]
    assert (value["suppressed"][0]["logit"], value["suppressed"][0]["threshold"]) == (4.967, 0.5)
    nothing = replace(transcript, suppressed=(), edited=())
    assert summary(nothing) == "0 windows withheld; stream edited in 0.0 s of the rest"
    assert summary(replace(nothing, steering=None)) == "plain Whisper, nothing was judged"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = brief_whisper()
    save_checkpoint(model, tmp_path / "tiny.pt")
    constant_steering(model, 4.0).save(tmp_path / "drop.safetensors")
    audio = write_wav(tmp_path / "a.wav", tone(2.0))
    words = ["--model", str(tmp_path / "tiny.pt"), "--steering", str(tmp_path / "drop.safetensors")]
    words += ["--beam_size", "None", "--explain", "--json"]
    said = (
        f"{audio}: 1 window withheld, decoding saved for 2.0 of 2.0 s; stream edited in 0.0 s of the rest\n"
        "  0.00-2.00 s  withheld: gate logit 4.00 > threshold 0.00, nobody speaks with probability 0.9820; "
        "not decoded, saved for 2.0 s\n"
    )
    for command in ("transcribe", "compare"):
        assert main([command, str(audio), *words]) == 0
        captured = capsys.readouterr()
        assert captured.err.endswith(said) and "--keep-suppressed" not in captured.err
        record = json.loads(captured.out)
        record = record if command == "transcribe" else record["steered"]
        (window,) = record["suppressed"]
        assert (window["logit"], window["threshold"], window["text"]) == (4.0, 0.0, None)
        assert record["edited"] == []
