"""vad="gate": the gate finds the speech, only that is transcribed, and what is left out is told."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audio_files import tone, write_wav
from faster_models import clip, mini_ct2
from steering_files import brief_whisper, constant_steering, save_checkpoint
from test_gate import raw_gate
from tiny import audio
from whisper.audio import log_mel_spectrogram

import whisper_steer
from benchmarks.methods import Setup, Unavailable
from benchmarks.peers.ours import SteeredStretches
from calibration.corpus import Clip
from whisper_steer import GateVad, LeftOut, UsageError, speech_finder
from whisper_steer.backends.stretched import _OneByOne
from whisper_steer.cli import main
from whisper_steer.cli.explain import lines, summary
from whisper_steer.speech_finder import Found, find_speech
from whisper_steer.steering import Steering
from whisper_steer.transcribe import Transcript
from whisper_steer.withholding import Suppressed
from whisper_steer.zoo import load_model

GREEDY: dict[str, Any] = {"temperature": 0.0, "beam_size": None}


# ---------- where speech is


def logits_of(model: Any, steering: Steering, samples: np.ndarray, options: GateVad, alpha: float = 1) -> Any:
    with whisper_steer.steer(model, alpha=alpha, steering=steering) as handle:
        return find_speech(model, handle, samples, len(samples) / 16000, options).logits


def some_steering(model: Any, **changes: Any) -> Steering:
    """A gate on block 1 that differs from frame to frame; its shift at block 0 is of an earlier layer."""
    coef = torch.randn(64, generator=torch.Generator().manual_seed(4)) * 0.2
    gate = raw_gate(64, layer=1, coef=coef, intercept=0.3, **changes)
    constant = constant_steering(model, 0.0)
    return replace(constant, gate=gate, edits=(replace(constant.edits[0], layer=0),))


def by_hand(model: Any, mel: torch.Tensor, steering: Steering) -> torch.Tensor:
    """Unsmoothed logits of a window of mel frames."""
    encoder, gate = model.encoder, steering.gate
    assert gate is not None
    x = torch.nn.functional.gelu(encoder.conv1(mel[None]))
    x = torch.nn.functional.gelu(encoder.conv2(x)).permute(0, 2, 1)
    x = x + encoder.positional_embedding[: x.shape[1]]
    for block in encoder.blocks[:2]:
        x = block(x)
    return gate.part(1, x)[0] + gate.intercept


def test_logits_are_those_of_the_gate_in_overlapping_windows(tiny_whisper: Any) -> None:
    steering = some_steering(tiny_whisper)
    samples = audio(1, 5)[: 5 * 16000 - 100]  # 499 frames of mel: the last encoder frame is half there
    mel = log_mel_spectrogram(samples, padding=480000)
    windows = {
        start: by_hand(tiny_whisper, mel[:, 2 * start : 2 * start + 200], steering) for start in (0, 80, 150)
    }
    expected = torch.cat([windows[0][:90], windows[80][10:80], windows[150][10:]])
    found = logits_of(tiny_whisper, steering, samples, GateVad(window_s=2.0, overlap_s=0.4))
    assert found.shape == (250,)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_short_recording_is_padded_and_smoothing_is_over_the_recording(tiny_whisper: Any) -> None:
    steering = some_steering(tiny_whisper, smooth=5)
    samples = audio(2, 1)
    mel = torch.nn.functional.pad(log_mel_spectrogram(samples, padding=480000)[:, :100], (0, 300))
    raw = by_hand(tiny_whisper, mel, steering)[:50].numpy()
    expected = [raw[max(i - 2, 0) : i + 3].mean() for i in range(50)]
    found = logits_of(tiny_whisper, steering, samples, GateVad(window_s=4.0))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert logits_of(tiny_whisper, steering, np.zeros(0, "f4"), GateVad()).shape == (0,)


def test_steering_does_not_change_what_is_found(tiny_whisper: Any) -> None:
    steering, samples = some_steering(tiny_whisper), audio(3, 3)
    plain, steered = (logits_of(tiny_whisper, steering, samples, GateVad(), alpha) for alpha in (0, 1))
    np.testing.assert_array_equal(plain, steered)


def test_the_frame_most_like_speech() -> None:
    found = Found((), np.array([3.0, 1.0, 2.0, 5.0]), 0.08)
    assert (found.least(0.0, 0.08), found.least(0.04, 0.08), found.least(0.06, 0.06)) == (1.0, 2.0, 5.0)
    assert Found((), np.zeros(0), 0.001).least(0.0, 0.001) == float("inf")


# ---------- what is transcribed


def test_nothing_found_means_nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sound = brief_whisper(), tone(2.0)
    steering = constant_steering(model, 4.0)
    monkeypatch.setattr(type(model), "decode", lambda *args, **kwargs: pytest.fail("decoded"))
    for alpha in (0, 1):
        found = whisper_steer.transcribe(sound, model, alpha=alpha, steering=steering, vad="gate")
        (left_out,) = found.suppressed
        assert isinstance(left_out, LeftOut) and (left_out.start, left_out.end) == (0.0, 2.0)
        assert (left_out.text, left_out.logit, found.text, found.segments) == (None, 4.0, "", ())
        assert left_out.score == pytest.approx(1 / (1 + np.exp(-4.0)))
        assert (found.vad, found.alpha, found.steering, found.language) == ("gate", alpha, "test", "en")
    assert json.loads(json.dumps(found.to_dict()))["suppressed"][0]["by"] == "vad"


def test_one_stretch_is_what_is_heard_without_a_vad() -> None:
    model, sound, seen = brief_whisper(), tone(1.0), []
    steering = constant_steering(model, -9.0)
    for alpha in (0, 1):
        asked: dict[str, Any] = {"alpha": alpha, "steering": steering, **GREEDY}
        without = whisper_steer.transcribe(sound, model, **asked)
        found = whisper_steer.transcribe(
            sound, model, vad="gate", progress=lambda *at: seen.append(at), **asked
        )
        assert found.text == without.text != "" and found.suppressed == ()
        assert [s.tokens for s in found.segments] == [s.tokens for s in without.segments]
    assert seen[-1] == (1.0, 1.0) and all(0 <= done <= 1.0 == total for done, total in seen)
    for run in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        assert run == sorted(run) and run[0] == (pytest.approx(1 / 3), 1.0)  # the speech is found


def test_looking_for_speech_tells_how_far_it_is() -> None:
    """Windows of 10 s, of which neighbours share 2 s, eight at a time; the last one ends with the sound."""
    model, seen = brief_whisper(), []
    with whisper_steer.steer(model, steering=constant_steering(model, 9.0)) as handle:
        found = find_speech(model, handle, tone(75.5), 75.5, GateVad(), lambda *at: seen.append(at))
    assert seen == [(66.0, 75.5), (75.5, 75.5)] and found.duration == 75.5


def test_without_a_vad_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sound = brief_whisper(), tone(1.0)
    monkeypatch.setattr(speech_finder, "frame_logits", lambda *args: pytest.fail("looked for speech"))
    steering = constant_steering(model, -9.0)
    plain, asked = (
        whisper_steer.transcribe(sound, model, steering=steering, **GREEDY, **vad)
        for vad in ({}, {"vad": None})
    )
    assert plain == asked and plain.vad is None


class Echo:
    """A backend whose one word is how long a recording is, with a withheld window and an edited stretch."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def load(self) -> Any:
        return None

    def close(self) -> None:
        pass

    def transcribe(self, sound: np.ndarray, options: Any, progress: Any = None) -> dict[str, Any]:
        self.asked.append(dict(options))
        seconds = len(sound) / 16000
        word = {"word": f" {seconds:g}", "start": 0.5, "end": seconds + 1, "probability": 0.5}
        segment = {
            "id": 0,
            "seek": 20,
            "start": 0.25,
            "end": seconds + 1,
            "text": word["word"],
            "words": [word],
        }
        if progress is not None:
            progress(seconds, seconds)
        return {
            "text": word["word"], "segments": [segment], "language": "de", "model": "echo", "alpha": 0.5,
            "suppressed": [Suppressed(1.0, seconds + 1, "", 0.9, None, None)], "edited": [(0.5, seconds + 1)],
            "everywhere": False,
        }  # fmt: skip


def test_stretches_are_put_together() -> None:
    echo, seen = Echo(), []
    options = {"language": None, "clip_timestamps": "0", "beam_size": 3}
    one_by_one = _OneByOne(echo, np.zeros(40 * 16000, "f4"), options, lambda *at: seen.append(at))
    left_out = LeftOut(12.0, 20.0, None, 0.9, None, None)
    found = one_by_one.joined([(0.0, 12.0), (20.0, 40.0)], [left_out])
    assert (found["text"], found["language"], found["model"], found["alpha"]) == (" 12 20", "de", "echo", 0.5)
    first, second = found["segments"]
    assert (first["id"], first["seek"], first["start"], first["end"]) == (0, 20, 0.25, 12.0)
    # what Whisper places behind the end of the stretch is at its end
    assert (second["id"], second["seek"], second["start"], second["end"]) == (1, 2020, 20.25, 40.0)
    assert [(w["start"], w["end"]) for w in second["words"]] == [(20.5, 40.0)]
    assert [(w.start, w.end) for w in found["suppressed"]] == [(1.0, 12.0), (12.0, 20.0), (21.0, 40.0)]
    assert found["suppressed"][1] is left_out and found["edited"] == [(0.5, 12.0), (20.5, 40.0)]
    # the language of the first stretch is that of the others
    assert echo.asked == [{"language": None, "beam_size": 3}, {"language": "de", "beam_size": 3}]
    assert seen == [(12.0, 40.0), (40.0, 40.0), (40.0, 40.0)]


@pytest.mark.parametrize("backend", ["openai", "faster", "transformers"])
def test_speech_between_silence_and_noise(backend: str) -> None:
    """The bundled model, in every runtime: 6 s of nothing, speech, 25 s of noise, the same speech, music."""
    if backend == "transformers":
        pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    speech = clip("speech")
    parts = [np.zeros(6 * 16000, "f4"), speech, np.resize(clip("noise"), 25 * 16000), speech, clip("music")]
    starts = np.cumsum([0, *(len(part) / 16000 for part in parts)])
    model: Any = str(mini_ct2()) if backend == "faster" else load_model("mini.en", device="cpu")
    if backend == "transformers":
        from whisper_steer.transformers_model import from_openai

        model = from_openai(model)
    options: dict[str, Any] = {"device": "cpu"} if backend == "faster" else {}
    found = whisper_steer.transcribe(
        np.concatenate(parts), model, vad="gate", backend=backend, word_timestamps=True, temperature=0.0,
        **options,
    )  # fmt: skip
    assert found.text.count("No, Sarah did not cover the little cat.") == 2
    assert found.text.count("Who has a blue coat?") == 2
    spoken = [(starts[1], starts[2]), (starts[3], starts[4])]
    for word in (word for segment in found.segments for word in segment.words or ()):
        assert any(start - 1 <= word.start <= word.end <= end + 2 for start, end in spoken), word
    left_out = [window for window in found.suppressed if isinstance(window, LeftOut)]
    assert len(left_out) == 3 and left_out[0].start == 0.0
    assert left_out[-1].end == pytest.approx(starts[-1])
    for window in left_out:
        assert window.start is not None and window.end is not None and window.text is None
        assert all(window.end <= start + 0.3 or window.start >= end - 0.3 for start, end in spoken)


def test_what_is_left_out_is_decoded_on_request() -> None:
    model, sound = brief_whisper(), tone(2.0)
    steering = constant_steering(model, 4.0)
    plain = whisper_steer.transcribe(sound, model, alpha=0, **GREEDY)
    for alpha in (0, 1):
        found = whisper_steer.transcribe(
            sound, model, alpha=alpha, steering=steering, vad="gate", decode_withheld=True, **GREEDY
        )
        (left_out,) = found.suppressed
        assert left_out.text and found.text == ""
        assert found.with_suppressed().text.strip() == left_out.text
        if alpha == 0:
            assert left_out.text == " ".join(s.text.strip() for s in plain.segments if s.text.strip())


def test_what_is_refused() -> None:
    model, sound = brief_whisper(), tone(1.0)
    steering = constant_steering(model, -9.0)
    with pytest.raises(UsageError, match="vad is 'silero': expected 'gate', a GateVad, or None"):
        whisper_steer.transcribe(sound, model, steering=steering, vad="silero")
    with pytest.raises(UsageError, match="clip_timestamps and vad both choose"):
        whisper_steer.transcribe(sound, model, steering=steering, vad="gate", clip_timestamps="0,1")
    with pytest.raises(UsageError, match="needs a steering with a gate, test has none"):
        whisper_steer.transcribe(sound, model, steering=replace(steering, gate=None), vad="gate")


def test_a_model_that_is_steered_already() -> None:
    model, sound = brief_whisper(), tone(2.0)
    with whisper_steer.steer(model, alpha=0.5, steering=constant_steering(model, 4.0)) as handle:
        found = whisper_steer.transcribe(sound, model, vad="gate")
        assert (found.alpha, len(found.suppressed)) == (0.5, 1)
        assert handle.withheld == []
        with pytest.raises(UsageError, match="steered already"):
            whisper_steer.transcribe(sound, model, vad="gate", alpha=1)


# ---------- in words


def test_explained_lines() -> None:
    nothing = LeftOut(0.0, 6.0, None, 0.9595, None, None, 3.166, 0.0)
    brief = LeftOut(9.0, 10.0, " Bye. ", 0.25, None, None, -1.1, 0.0)
    window = Suppressed(10.0, 12.0, None, 0.99, None, None, 4.6, 3.0)
    transcript = Transcript("", (), "en", 20.0, (nothing, brief, window), "m", "s", 1.0, vad="gate")
    assert summary(transcript) == (
        "speech found in 13.0 of 20.0 s by the gate; 1 window withheld, decoding saved for 2.0 of 20.0 s; "
        "stream edited in 0.0 s of the rest"
    )
    assert lines(transcript)[:2] == [
        "0.00-6.00 s  left out: nobody speaks, gate logit 3.17 > threshold 0.00 in the frame most like "
        "speech; not decoded",
        "9.00-10.00 s  left out: nobody speaks for long enough, gate logit -1.10 <= threshold 0.00 in the "
        'frame most like speech; decoded on request: "Bye."',
    ]
    assert summary(replace(transcript, alpha=0.0)) == (
        "speech found in 13.0 of 20.0 s by the gate; plain Whisper, nothing else was judged"
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = brief_whisper()
    save_checkpoint(model, tmp_path / "tiny.pt")
    constant_steering(model, 4.0).save(tmp_path / "drop.safetensors")
    sound = write_wav(tmp_path / "a.wav", tone(2.0))
    words = ["transcribe", str(sound), "--model", str(tmp_path / "tiny.pt"), "--beam_size", "None"]
    steered = [*words, "--steering", str(tmp_path / "drop.safetensors"), "--vad", "gate"]
    for alpha in ("0", "1"):
        assert main([*steered, "--alpha", alpha, "--json"]) == 0
        captured = capsys.readouterr()
        record = json.loads(captured.out)
        (left_out,) = record["suppressed"]
        assert (left_out["start"], left_out["end"], left_out["by"]) == (0.0, 2.0, "vad")
        assert record["vad"] == "gate" and record["segments"] == []
        assert "1 stretch left out, nobody speaks (2.0 s)" in captured.err
    folder = ["--output_format", "srt", "--output_dir", str(tmp_path)]
    assert main([*steered, "--explain", *folder]) == 0
    assert "0.00-2.00 s  left out: nobody speaks, gate logit 4.00" in capsys.readouterr().err
    assert (tmp_path / "a.srt").read_text() == ""
    assert main([*words, "--vad", "silero"]) == 2
    assert capsys.readouterr().err == "error: --vad silero: expected gate\n"


# ---------- as a benchmark method


@pytest.mark.parametrize(
    ("scores", "events"),
    [
        ([(0.9, -0.2), (0.7, -3.0)], (False, True)),
        ([(0.4, -3.0)], (True, True)),
        ([(0.7, -2.0)], (False, False)),
    ],
)
def test_label_events_of_the_benchmark_method_are_those_of_its_segments(
    tiny_whisper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: Any, events: Any
) -> None:
    path = tmp_path / "steering.safetensors"
    constant_steering(tiny_whisper, 4.0).save(path)
    setup = Setup(tiny_whisper, "tiny", tmp_path, lambda c: [], lambda c: [], steering=str(path))
    segments = [
        SimpleNamespace(start=0, end=1, text=" a", no_speech_prob=p, avg_logprob=logprob)
        for p, logprob in scores
    ]
    found = SimpleNamespace(text=" a", segments=segments)
    module = importlib.import_module("whisper_steer.transcribe")
    monkeypatch.setattr(module, "transcribe", lambda *args, **options: found)
    sound = Clip("a", "long", "long", "test", None, "a", audio=lambda: tone(2.0))
    (heard,) = SteeredStretches("ours", "about").hear(setup, 1.0, [sound])
    assert (heard.nsp, heard.hr) == events


def test_the_benchmark_method(tiny_whisper: Any, tmp_path: Path) -> None:
    path = tmp_path / "steering.safetensors"
    constant_steering(tiny_whisper, 4.0).save(path)
    setup = Setup(
        tiny_whisper, "tiny", tmp_path, lambda c: [], lambda c: [], progress=False, steering=str(path)
    )
    method = SteeredStretches("ours", "about")
    method.prepare(setup)
    sound = Clip("a", "long", "long", "test", None, "a", audio=lambda: tone(2.0))
    (heard,) = method.hear(setup, 1.0, [sound])
    assert (heard.text, heard.segments, heard.nsp, heard.hr) == ("", (), False, False)
    assert heard.seconds > 0  # what was left out is recognised non-speech
    other = replace(method, options=GateVad(threshold=0.25))
    assert method.fingerprint(setup) != other.fingerprint(setup)
    replace(constant_steering(tiny_whisper, 4.0), gate=None).save(path)
    setup.memory.clear()
    with pytest.raises(Unavailable, match="a steering with a gate"):
        method.prepare(setup)
