"""Voice activity detection as a competitor: Silero before openai-whisper, and faster-whisper's vad_filter."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from faster_models import clip as demo

from benchmarks.methods import Setup, Unavailable
from benchmarks.peers import faster_whisper, silero
from calibration.corpus import Clip
from calibration.decoding import ClipTranscript, transcribe_clips
from calibration.evaluate import normalise
from whisper_steer.attach import steer
from whisper_steer.zoo import load_model

pytest.importorskip("onnxruntime", reason="Silero VAD is an ONNX file")
RATE = 16_000


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    def none(clips):
        raise AssertionError("these methods do not ask for plain transcripts")

    return Setup(load_model("mini.en", device="cpu"), "mini.en", tmp_path_factory.mktemp("cache"), none, none)


def clips(**audios):
    return [Clip(name, "speech", name, "test", audio=lambda a=audio: a) for name, audio in audios.items()]


def silence(seconds):
    return np.zeros(int(seconds * RATE), np.float32)


@pytest.fixture(scope="module")
def conversation():
    """5 s of silence, the demo's sentence, 32 s of silence, the sentence again."""
    speech = demo("speech")
    return np.concatenate([silence(5), speech, silence(32), speech])


def transcript(text, *segments, nsp=True, hr=True):
    greedy = ((0.1 if nsp else 0.9 if not hr else 0.55, -0.1 if hr else -2.0),)
    return ClipTranscript(text, (), greedy, 1.0, segments)


def test_stretches_enclose_the_speech(conversation):
    speech = len(demo("speech"))
    (a, b), (c, d) = silero.speech_stretches(conversation)
    assert 5 * RATE - 8000 <= a <= 5 * RATE + 8000 and b <= 5 * RATE + speech + 8000
    assert 37 * RATE + speech - 8000 <= c and d == len(conversation)
    assert silero.speech_stretches(silence(5)) == [] and silero.speech_stretches(silence(0)) == []


def test_a_higher_threshold_never_finds_more():
    noisy = demo("speech") + np.random.default_rng(0).normal(0, 0.05, len(demo("speech"))).astype("f4")
    found = [sum(b - a for a, b in silero.speech_stretches(noisy, t)) for t in silero.THRESHOLDS]
    assert found == sorted(found, reverse=True) and found[0] > 0


def test_join_moves_times_and_keeps_them_in_their_stretch():
    first = transcript(" a b", (0.0, 0.5, " a"), (0.5, 30.0, " b"), nsp=False, hr=False)
    second = transcript(" c", (0.25, 1.0, " c"), nsp=False, hr=True)
    stretches = [(16_000, 32_000), (80_000, 112_000)]
    heard = silero.join(stretches, [first, second], 2.5)
    assert heard.text == " a b c" and heard.seconds == 2.5
    assert heard.segments == ((1.0, 1.5, " a"), (1.5, 2.0, " b"), (5.25, 6.0, " c"))
    assert (heard.nsp, heard.hr) == (False, True)
    nothing = silero.join([], [], 0.5)
    assert (nothing.text, nothing.segments, nothing.nsp, nothing.hr) == ("", (), False, False)


def test_silero_transcribes_the_stretches_alone(setup, conversation):
    method = silero.METHODS[0]
    method.prepare(setup)
    noise = demo("noise")
    found = list(method.hear(setup, 0.5, clips(a=conversation, b=noise)))
    stretches = silero.speech_stretches(conversation)
    alone = transcribe_clips(setup.model, [conversation[a:b] for a, b in stretches])
    assert found[0].text == alone[0].text + alone[1].text
    assert normalise(alone[0].text) == normalise(alone[1].text) != ""
    starts = [start for start, _, _ in found[0].segments]
    assert starts[0] >= stretches[0][0] / RATE and starts[-1] >= stretches[1][0] / RATE
    assert found[0].nsp and found[0].hr
    assert found[1].text == "" and not found[1].nsp and not found[1].hr
    assert all(heard.seconds > 0 for heard in found)


def test_a_steered_model_is_heard_behind_the_vad(setup, conversation):
    audio = conversation[: 12 * RATE]
    with steer(setup.model, alpha=0.0):
        plain = list(silero.hear_behind_vad(setup.model, [audio]))
    (stretch,) = silero.speech_stretches(audio)
    assert plain[0].text == transcribe_clips(setup.model, [audio[slice(*stretch)]])[0].text


def test_a_method_without_its_vad_says_why(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unavailable, match="onnxruntime is missing"):
        silero.METHODS[0].prepare(setup)
    with pytest.raises(Unavailable, match="pip install"):
        faster_whisper.METHODS[1].prepare(setup)


def test_names_strengths_and_defaults():
    methods = {method.name: method for method in (*silero.METHODS, *faster_whisper.METHODS)}
    assert list(methods) == [
        "silero", "faster-whisper", "faster-whisper-vad", "faster-whisper-batched",
        "faster-whisper-batched-vad",
    ]  # fmt: skip
    for name, method in methods.items():
        vad = name == "silero" or name.endswith("-vad")
        assert method.strengths == ((0.3, 0.5, 0.7, 0.9) if vad else (0.0,))
        assert set(method.quick_strengths) <= set(method.strengths)
        assert "strength" in method.about and "\n" not in method.about


def test_windows_cover_a_recording():
    assert faster_whisper.windows(70 * RATE) == [
        {"start": 0.0, "end": 30.0}, {"start": 30.0, "end": 60.0}, {"start": 60.0, "end": 70.0},
    ]  # fmt: skip
    assert faster_whisper.windows(0) == [{"start": 0.0, "end": 0.0}]


def test_the_model_is_converted_and_loaded_once(setup):
    pytest.importorskip("transformers", reason="CTranslate2's converter reads transformers folders")
    for method in faster_whisper.METHODS:
        method.prepare(setup)
    folder = faster_whisper.converted(setup)
    assert folder.parent == setup.cache and (folder / "model.bin").is_file()
    assert [path.name for path in setup.cache.iterdir()] == [folder.name]
    assert faster_whisper.load(setup) is faster_whisper.load(setup)
    assert faster_whisper.load(setup).model.device == "cpu"


@pytest.mark.parametrize("batched", [False, True])
def test_faster_whisper_with_and_without_its_vad(setup, conversation, batched):
    pytest.importorskip("transformers", reason="CTranslate2's converter reads transformers folders")
    plain, vad = (m for m in faster_whisper.METHODS if m.batched == batched)
    speech, noise = demo("speech"), demo("noise")
    given = clips(a=speech, b=noise, c=conversation)
    for method in (plain, vad):
        method.prepare(setup)
    told = list(plain.hear(setup, 0.0, given))
    filtered = list(vad.hear(setup, 0.5, given))
    assert normalise(told[0].text) == normalise(filtered[0].text) != ""
    assert normalise(told[1].text) != "" and filtered[1].text == "" and filtered[1].segments == ()
    for heard in (*told, *filtered):
        assert heard.text == "".join(text for _, _, text in heard.segments)
        assert heard.seconds > 0
    # a confident sentence escapes the skip rule; where the VAD left all out there is nothing to keep
    assert [(one.nsp, one.hr) for one in told] == [(True, True), (told[1].nsp, True), (True, True)]
    assert [(one.nsp, one.hr) for one in filtered] == [(True, True), (False, False), (True, True)]
    second = (37 * RATE + len(speech)) / RATE
    assert filtered[2].segments[0][0] == pytest.approx(5, abs=1)
    assert filtered[2].segments[-1][1] == pytest.approx(second + len(speech) / RATE, abs=1)


def test_a_device_that_ctranslate2_does_not_have(tmp_path):
    class Elsewhere:
        device = torch.device("meta")

    setup = Setup(Elsewhere(), "m", tmp_path, lambda clips: [], lambda clips: [])
    with pytest.raises(Unavailable, match="does not run on meta"):
        faster_whisper.load(setup)
