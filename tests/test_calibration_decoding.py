from dataclasses import replace

import numpy as np
import pytest
import torch
import whisper
from calibration_tools import make_terse_whisper, sound

from calibration import decoding
from calibration.activations import cut_window, padded_log_mel
from calibration.decoding import ClipTranscript, DecodedWindow, transcribe_clips, withhold


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


def test_transcripts_are_those_of_whisper_transcribe(model):
    audios = [
        sound(name, seconds, speech=name < "c") for name, seconds in zip("abcd", (1, 3, 5, 33), strict=True)
    ]
    ours = transcribe_clips(model, audios, batch=3)
    for audio, transcript in zip(audios, ours, strict=True):
        direct = whisper.transcribe(model, audio, fp16=False)
        assert transcript.text == direct["text"]
        assert "".join(window.text for window in transcript.windows) == direct["text"]
        assert [w.seek for w in transcript.windows] == sorted({s["seek"] for s in direct["segments"]})
        assert transcript.windows[0].avg_logprob == pytest.approx(
            direct["segments"][0]["avg_logprob"], abs=1e-3
        )
        assert transcript.seconds == len(audio) / 16000
    assert [len(t.greedy) for t in ours] == [1, 1, 1, 2]
    assert ours[3].windows[1].size < 3000


def test_the_model_is_left_as_it_was(model):
    transcribe_clips(model, [sound("a", 1.0, speech=True)])
    assert "decode" not in model.__dict__


def test_fallback_reuses_the_encoded_batch_and_repeats_with_the_audio(model, monkeypatch):
    calls = []
    original = whisper.model.Whisper.decode

    def unsure(self, mel, options):
        calls.append((tuple(mel.shape), options.temperature))
        results = original(self, mel, options)
        lower = [
            replace(r, avg_logprob=-3.0 if options.temperature < 0.4 else r.avg_logprob)
            for r in (results if isinstance(results, list) else [results])
        ]
        return lower if isinstance(results, list) else lower[0]

    monkeypatch.setattr(whisper.model.Whisper, "decode", unsure)
    audio = sound("f", 2.0, speech=True)
    torch.manual_seed(5)
    first = transcribe_clips(model, [audio])[0]
    assert calls == [((1, 80, 3000), 0.0), ((1500, 32), 0.2), ((1500, 32), 0.4)]
    assert first.windows[0].temperature == 0.4
    assert first.greedy[0][1] == -3.0  # labels look at temperature 0
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert transcribe_clips(model, [audio])[0] == first
    assert torch.equal(torch.get_rng_state(), state)


def window(seek, text, size=1000, p=0.1):
    return DecodedWindow(seek, size, text, p, -0.2, 0.0)


def test_withholding_takes_the_words_and_jumps_to_the_windows_end():
    transcript = ClipTranscript(
        " one two three", (window(0, " one", 3000), window(800, " two", 2200), window(3000, " three", 500)),
        ((0.1, -0.2), (0.3, -0.4)), 35.0,
        ((0.0, 4.0, " one"), (8.0, 12.0, " two"), (30.0, 31.0, " th"), (31.0, 34.0, "ree")),
    )  # fmt: skip
    assert withhold(transcript, [False] * 3) == transcript
    first = withhold(transcript, [True, False, False])
    assert first.segments == transcript.segments[2:]
    assert withhold(transcript, [False, True, False]).segments == transcript.segments[:1] + first.segments
    assert first.text == " three"  # the second window lay inside the first
    assert [w.seek for w in first.windows] == [0, 3000]
    assert first.greedy == ((1.0, -100.0), (0.3, -0.4))
    assert first.nsp and first.hr  # the last window still counts
    assert withhold(transcript, [False, True, False]).text == " one three"
    everything = withhold(transcript, [True, True, True])
    assert everything.text == "" and not everything.nsp and not everything.hr
    with pytest.raises(ValueError, match="2 decisions for 3 windows"):
        withhold(transcript, [True, False])


def test_outcome_of_a_clip():
    transcript = ClipTranscript("you", (window(0, "you"),), ((0.9, -0.3),), 10.0)
    outcome = transcript.outcome()
    assert (outcome.text, outcome.nsp, outcome.hr, outcome.seconds) == ("you", False, True, 10.0)
    assert transcript.no_speech_prob == 0.9 and transcript.avg_logprob == -0.3


def test_a_clip_too_short_for_one_frame(model):
    transcript = transcribe_clips(model, [np.zeros(10, np.float32)])[0]
    assert transcript.text == "" and transcript.windows == ()


def test_windows_in_half_precision_are_found():
    """As on a GPU, where mels are float16 when they are decoded."""
    mel, content = padded_log_mel(sound("half", 35.0, speech=True), 80)
    clip = decoding._Prefetched(mel, content, [])
    for seek in (0, 500):
        window = cut_window(mel, content, seek).half()
        assert decoding._find_window(clip, window, 0) == seek
    with pytest.raises(RuntimeError, match="not a slice"):
        decoding._find_window(clip, cut_window(mel, content, 0).half() + 1, 0)
