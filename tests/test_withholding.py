import copy
import json
import math
import pickle
import threading

import numpy as np
import pytest
import torch
import whisper
from conftest import TINY_DIMS, make_tiny_whisper
from test_gate import raw_gate
from tiny import OPTIONS, audio, mel, outputs, same_result, says, shift
from whisper.decoding import DecodingOptions, DecodingResult

from whisper_steer import attach
from whisper_steer.attach import Suppressed, WithheldMarker, collecting, handles_of, steer
from whisper_steer.steering import Steering
from whisper_steer.withholding import active_collector, marked, skipped

QUICK = {"fp16": False, "sample_len": 6}
RECORD = Suppressed(None, None, "you", 0.9, 0.5, -0.3)


def run(model, sound, **options):
    return whisper.transcribe(model, sound, **{"temperature": 0.0, **QUICK, **options})


@pytest.fixture
def mixed(tiny_whisper):
    """(75 s of audio, a gate): a tone, 30 s of another, the tone again; 'nobody speaks' in the middle."""
    sound = np.concatenate([audio(1, 30), audio(6, 30), audio(1, 15)])
    padded = whisper.log_mel_spectrogram(sound, padding=whisper.audio.N_SAMPLES)
    windows = [whisper.pad_or_trim(padded[:, start : start + 3000], 3000) for start in (0, 3000, 6000)]
    # a probe for the second window against the first
    first, second, _ = (outputs(tiny_whisper, w[None])[1][0][0] for w in windows)
    gate = raw_gate(64, coef=second.mean(0) - first.mean(0), intercept=0.0, smooth=301)
    logits = [
        float(gate.window_logit(gate.frame_logits(outputs(tiny_whisper, w[None])[1][0]))) for w in windows
    ]
    assert logits[1] > max(logits[0], logits[2])
    middle = (logits[1] + max(logits[0], logits[2])) / 2
    return sound, raw_gate(64, coef=gate.probes[0].coef, intercept=0.0, smooth=301, threshold=middle)


# ---------- openai-whisper's own rule drops a withheld window


def test_whisper_drops_everything_where_nobody_speaks(tiny_whisper):
    """With openai-whisper's default thresholds and temperatures."""
    sound = audio(2, 70)
    plain = [tiny_whisper.decode(w, OPTIONS).text for w in _windows(sound)]
    assert all(plain)
    with steer(tiny_whisper, steering=Steering((), says(True)), decode_withheld=True) as handle:
        result = whisper.transcribe(tiny_whisper, sound, fp16=False, sample_len=OPTIONS.sample_len)
        assert result == {"text": "", "segments": [], "language": "en"}
        assert len(handle.withheld) == 3  # one decoding per window: no higher temperature was tried
        record = handle.withheld[0]
        assert record.text == plain[0] and record.start is None and record.end is None
        assert record.score == pytest.approx(1 / (1 + math.exp(-10.0)))
        assert record.no_speech_prob < 0.6 and record.avg_logprob < 0
        assert (record.logit, record.threshold, record.decoded) == (10.0, 2.0, True)
    assert whisper.transcribe(tiny_whisper, sound, **QUICK)["text"] != ""


def _windows(sound):
    padded = whisper.log_mel_spectrogram(sound, padding=whisper.audio.N_SAMPLES)
    starts = range(0, padded.shape[-1] - 3000, 3000)
    return [whisper.pad_or_trim(padded[:, s : min(s + 3000, padded.shape[-1] - 3000)], 3000) for s in starts]


@pytest.mark.parametrize("options", [{}, {"condition_on_previous_text": False}, {"without_timestamps": True}])
def test_only_the_window_without_speech_is_dropped(tiny_whisper, mixed, options):
    sound, gate = mixed
    # windows of their own, so that seeking and prompts do not depend on what the middle one says
    options = {"clip_timestamps": "0,30,30,60,60,75", "condition_on_previous_text": False, **options}
    plain = run(tiny_whisper, sound, **options)
    with steer(tiny_whisper, steering=Steering((), gate)):
        found = run(tiny_whisper, sound, **options)
    kept = [s for s in plain["segments"] if not 30 <= s["start"] < 60]
    assert 0 < len(kept) < len(plain["segments"])
    keys = ("start", "end", "text", "tokens", "seek")
    first = [s for s in kept if s["start"] < 30]
    assert [[s[k] for k in keys] for s in found["segments"][: len(first)]] == [
        [s[k] for k in keys] for s in first
    ]
    assert all(not 30 <= s["start"] < 60 for s in found["segments"])
    assert [s["id"] for s in found["segments"]] == list(range(len(found["segments"])))


def test_scores_of_a_dropped_window_fulfil_the_rule():
    result = DecodingResult(torch.zeros(1), "en", None, [1], "you", -0.2, 0.1, 0.0, 9.9)
    found = skipped(result)
    assert found.no_speech_prob > 0.6 and found.avg_logprob <= -1.0 and found.compression_ratio <= 2.4
    assert (found.text, found.tokens, found.temperature) == ("", [], 0.0)


def test_without_the_rule_there_is_still_no_text_and_one_record(tiny_whisper):
    """no_speech_threshold=None makes openai-whisper retry at every temperature."""
    with steer(tiny_whisper, steering=Steering((), says(True))) as handle:
        result = whisper.transcribe(tiny_whisper, audio(1, 20), no_speech_threshold=None, **QUICK)
        assert result["text"] == "" and len(handle.withheld) == 1
        other = whisper.transcribe(tiny_whisper, audio(1, 20), logprob_threshold=None, **QUICK)
        assert other["segments"] == [] and len(handle.withheld) == 2


# ---------- collecting: the window's place in time is kept


def collected(model, sound, **options):
    """(kept segments, Suppressed with times), as a caller of `collecting` makes them."""
    with collecting(model) as collector:
        result = run(model, sound, **options)
    marked = [s for s in result["segments"] if isinstance(s["temperature"], WithheldMarker)]
    assert [s["temperature"].record for s in marked] == collector.records
    assert all(s["text"] == "" and s["tokens"] == [] for s in marked)
    kept = [s for s in result["segments"] if not isinstance(s["temperature"], WithheldMarker)]
    return kept, [(s["start"], s["end"], s["seek"], s["temperature"].record) for s in marked]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_timestamps": True},
        {"without_timestamps": True},
        {"condition_on_previous_text": False},
        {"word_timestamps": True, "hallucination_silence_threshold": 2.0},
        {"no_speech_threshold": None},
        {"logprob_threshold": None, "compression_ratio_threshold": None},
        {"temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)},
    ],
)
def test_withheld_windows_have_exact_times(tiny_whisper, options):
    for decode_withheld in (True, False):
        steering = Steering((), says(True))
        with steer(tiny_whisper, steering=steering, decode_withheld=decode_withheld) as handle:
            kept, withheld = collected(tiny_whisper, audio(2, 70), **options)
            assert kept == [] and handle.withheld == []
        assert [w[:3] for w in withheld] == [(0.0, 30.0, 0), (30.0, 60.0, 3000), (60.0, 70.0, 6000)]
        assert all(bool(record.text) == record.decoded == decode_withheld for *_, record in withheld)


def test_withheld_clips_have_exact_times(tiny_whisper):
    with steer(tiny_whisper, steering=Steering((), says(True))):
        _, withheld = collected(tiny_whisper, audio(2, 70), clip_timestamps="5,20.5,41,69")
    assert [w[:2] for w in withheld] == [(5.0, 20.5), (41.0, 69.0)]


def test_collecting_keeps_what_dropping_keeps(tiny_whisper, mixed):
    """The same segments come out either way; only the record of the rest differs."""
    sound, gate = mixed
    with steer(tiny_whisper, steering=Steering((shift(2, 0.2),), gate)) as handle:
        dropped = run(tiny_whisper, sound, without_timestamps=True)
        kept, withheld = collected(tiny_whisper, sound, without_timestamps=True)
        without_id = [{k: v for k, v in s.items() if k != "id"} for s in dropped["segments"]]
        assert [{k: v for k, v in s.items() if k != "id"} for s in kept] == without_id
        assert [(s["start"], s["end"]) for s in kept] == [(0.0, 30.0), (60.0, 75.0)]
        assert [w[:2] for w in withheld] == [(30.0, 60.0)]
        assert [r.text for r in handle.withheld] == [w[3].text for w in withheld]


def test_collecting_is_per_model_per_thread_and_nests(tiny_whisper):
    other = object()
    with collecting(tiny_whisper) as outer, collecting(other):
        assert active_collector(tiny_whisper) is outer
        with collecting(tiny_whisper) as inner:
            assert active_collector(tiny_whisper) is inner
        assert active_collector(tiny_whisper) is outer
        found = []
        thread = threading.Thread(target=lambda: found.append(active_collector(tiny_whisper)))
        thread.start()
        thread.join()
        assert found == [None]
    assert active_collector(tiny_whisper) is None


def test_an_exception_ends_collecting(tiny_whisper):
    with pytest.raises(RuntimeError, match="stop"), collecting(tiny_whisper):
        raise RuntimeError("stop")
    assert active_collector(tiny_whisper) is None


# ---------- single decodings


def test_the_decoder_is_run_for_withheld_windows_only_if_asked_for(tiny_whisper):
    runs = []
    tiny_whisper.decoder.register_forward_pre_hook(lambda *a: runs.append(1))
    with steer(tiny_whisper, steering=Steering((), says(True))) as handle:
        result = tiny_whisper.decode(mel(), OPTIONS)
        assert runs == [] and result.text == "" and result.language == "en"
        sure = pytest.approx(1.0, abs=1e-4)
        assert handle.withheld[0] == Suppressed(None, None, None, sure, None, None, 10.0, 2.0)
        assert not handle.withheld[0].decoded
        _, withheld = collected(tiny_whisper, audio(1, 45))
        assert runs == [] and [w[:2] for w in withheld] == [(0.0, 30.0), (30.0, 45.0)]
        handle.decode_withheld = True
        tiny_whisper.decode(mel(), OPTIONS)
        assert runs and handle.withheld[1].text


def test_a_batch_is_judged_window_by_window(tiny_whisper):
    batch = torch.stack([mel(seed) for seed in range(4)])
    gate = raw_gate(64, coef=torch.randn(64, generator=torch.Generator().manual_seed(1)), intercept=0.0)
    logits = gate.window_logit(gate.frame_logits(outputs(tiny_whisper, batch)[1][0])).tolist()
    two_of_four = sorted(logits)[2] - 1e-3
    gate = raw_gate(64, coef=gate.probes[0].coef, intercept=0.0, threshold=two_of_four)
    plain = tiny_whisper.decode(batch, OPTIONS)
    for decode_withheld in (True, False):
        with steer(tiny_whisper, steering=Steering((), gate), decode_withheld=decode_withheld) as handle:
            found = tiny_whisper.decode(batch, OPTIONS)
            empty = [result.text == "" for result in found]
            assert empty == [logit > gate.threshold for logit in logits] and sum(empty) == 2
            for result, expected, withheld in zip(found, plain, empty, strict=True):
                assert result.audio_features.shape == (1500, 64)
                if not withheld:
                    assert result.text == expected.text and result.tokens == expected.tokens
            texts = [
                p.text if decode_withheld else None
                for p, withheld in zip(plain, empty, strict=True)
                if withheld
            ]
            assert [record.text for record in handle.withheld] == texts


def test_single_and_batch_keep_their_shapes(tiny_whisper):
    with steer(tiny_whisper, steering=Steering((), says(True))):
        assert isinstance(tiny_whisper.decode(mel(), OPTIONS), DecodingResult)
        found = tiny_whisper.decode(mel()[None], OPTIONS)
        assert isinstance(found, list) and len(found) == 1


def test_options_may_be_given_as_keywords(tiny_whisper):
    options = {"fp16": False, "language": "en", "sample_len": 3}
    expected = tiny_whisper.decode(mel(), **options)
    with steer(tiny_whisper, steering=Steering((), says(False))):
        same_result(tiny_whisper.decode(mel(), **options), expected)
    with steer(tiny_whisper, steering=Steering((shift(1, 0.0),))):
        same_result(tiny_whisper.decode(mel(), **options), expected)


def test_encoded_features_pass_through(tiny_whisper):
    expected = tiny_whisper.decode(mel(), OPTIONS)
    with steer(tiny_whisper, steering=Steering((), says(True))) as handle:
        same_result(tiny_whisper.decode(expected.audio_features, OPTIONS), expected)
        assert handle.withheld == []


def test_the_edit_reaches_the_text_and_the_features(tiny_whisper):
    plain = tiny_whisper.decode(mel(), OPTIONS)
    steering = Steering((shift(2, 3.0),), says(True))
    with steer(tiny_whisper, steering=steering, decode_withheld=True) as handle:
        found = tiny_whisper.decode(mel(), OPTIONS)
        expected = tiny_whisper.encoder(mel()[None])[0]
        assert torch.equal(found.audio_features, expected)
        assert not torch.equal(found.audio_features, plain.audio_features)
        assert handle.withheld[0].text != plain.text


def test_alpha_moves_the_threshold(tiny_whisper):
    gate = raw_gate(64, coef=torch.zeros(64), intercept=2.5, threshold=2.0, spread=1.0)
    with steer(tiny_whisper, alpha=1.0, steering=Steering((), gate)) as handle:
        assert tiny_whisper.decode(mel(), OPTIONS).text == ""
        handle.alpha = 0.5  # the threshold is now 3
        assert tiny_whisper.decode(mel(), OPTIONS).text != ""
        handle.alpha = 0.75  # 2.42
        assert tiny_whisper.decode(mel(), OPTIONS).text == ""


def test_only_the_last_records_are_kept(tiny_whisper, monkeypatch):
    monkeypatch.setattr(attach, "MAX_RECORDS", 3)
    with steer(tiny_whisper, steering=Steering((), says(True)), decode_withheld=False) as handle:
        for seed in range(5):
            tiny_whisper.decode(mel(seed), OPTIONS)
        assert len(handle.withheld) == 3
        handle.withheld.clear()  # a copy
        assert len(handle.withheld) == 3


# ---------- multilingual models


@pytest.fixture
def multilingual():
    dims = copy.copy(TINY_DIMS)
    dims.n_vocab = 51865
    return make_tiny_whisper(2, dims)


def test_language_identification_is_edited_but_not_gated(multilingual):
    plain = multilingual.decode(mel(), DecodingOptions(task="lang_id", fp16=False))
    assert handles_of(multilingual) == ()
    with steer(multilingual, steering=Steering((), says(True))) as handle:
        found = multilingual.decode(mel(), DecodingOptions(task="lang_id", fp16=False))
        assert found.language_probs == plain.language_probs and handle.withheld == []
        assert multilingual.detect_language(mel())[1] == plain.language_probs
    assert "detect_language" not in multilingual.__dict__


def test_the_language_of_a_window_that_was_not_decoded_is_not_made_up(multilingual):
    with steer(multilingual, steering=Steering((), says(True)), decode_withheld=False):
        assert multilingual.decode(mel(), fp16=False).language is None
        assert multilingual.decode(mel(), fp16=False, language="de").language == "de"


def test_detecting_a_language_does_not_disturb_a_decoding_in_another_thread(multilingual):
    options = DecodingOptions(fp16=False, language="en", sample_len=30)
    features = multilingual.encoder(mel(2)[None])
    with steer(multilingual, steering=Steering((shift(1, 0.1),))):
        expected = multilingual.decode(mel(1), options)
        language = multilingual.detect_language(features)[1]
        detected, decoding, done = [], threading.Event(), threading.Event()

        def detect():
            decoding.wait(300)
            while not done.is_set():
                detected.append(multilingual.detect_language(features)[1])

        multilingual.decoder.register_forward_hook(lambda *a: decoding.set())
        thread = threading.Thread(target=detect)
        thread.start()
        try:
            same_result(multilingual.decode(mel(1), options), expected)
        finally:
            done.set()
            thread.join()
        assert all(found == language for found in detected)


# ---------- the marker


def test_a_marker_is_a_temperature_with_a_record():
    result = marked(DecodingResult(torch.zeros(1), "en", None, [1], "you", -0.2, 0.1, 0.0, 9.9), 0.4, RECORD)
    marker = result.temperature
    assert marker == 0.4 and isinstance(marker, float) and json.dumps(marker) == "0.4"
    assert (result.text, result.tokens) == ("", []) and result.avg_logprob == result.no_speech_prob == 0.0
    for again in (copy.deepcopy(marker), pickle.loads(pickle.dumps(marker))):
        assert again == 0.4 and again.record == RECORD
