"""Methods that judge plain Whisper's transcripts, openai-whisper's own thresholds, and ours without gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_tools import clips, make_terse_whisper
from steering_files import raw_gate
from test_sae import random_sae

from benchmarks.hearing_cache import HearingCache
from benchmarks.listening import PlainWhisper
from benchmarks.methods import (
    ALONE,
    AT_ONCE,
    BEHIND_VAD,
    FASTER,
    GATED,
    JUDGED,
    TIMED,
    Heard,
    Setup,
    Unavailable,
)
from benchmarks.peers import (
    all_methods,
    linear_gate,
    no_speech_prob,
    openai_thresholds,
    ours,
    ours_gate,
    phrase_filter,
)
from benchmarks.peers.intervention import label_events
from benchmarks.peers.judging import judge
from calibration.decoding import ClipTranscript, DecodedWindow, transcribe_clips
from calibration.hallucinations import labels_of
from whisper_steer.attach import handles_of, steer
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import LatentEdit, Shift, Steering

# openai-whisper leaves its vocabulary and its spelling table open until they are collected
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*whisper:ResourceWarning")

SETS = clips(6, 6)
EVERY = [clip for group in SETS.values() for clip in group]


def transcript(*windows: tuple[str, float, float]) -> ClipTranscript:
    """Windows of 30 s: (text, no_speech_prob, avg_logprob); each text is one segment."""
    decoded = [DecodedWindow(3000 * n, 3000, text, p, logp, 0.0) for n, (text, p, logp) in enumerate(windows)]
    segments = tuple((30.0 * n, 30.0 * n + 4, text) for n, (text, _, _) in enumerate(windows) if text)
    return ClipTranscript(
        "".join(text for text, _, _ in windows), tuple(decoded), tuple(window[1:] for window in windows),
        30.0 * len(windows), segments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = make_terse_whisper(1)
    model.name = "nobody-kept-it"
    return model


@pytest.fixture
def setup(model, tmp_path) -> Setup:
    plain = PlainWhisper(model, HearingCache(tmp_path), "f")
    made = Setup(model, model.name, tmp_path, plain.heard, plain.windows, quick=True, progress=False)
    made.calibration = SETS
    made.labels = {clip.id: labels_of(found) for clip, found in zip(EVERY, plain.windows(EVERY), strict=True)}
    return made


def test_every_method_has_its_own_name_and_range() -> None:
    methods = all_methods()
    names = [method.name for method in methods]
    assert names[0] == "plain" and len(set(names)) == len(names)
    for method in methods:
        assert list(method.strengths) == sorted(set(method.strengths)) and method.strengths[0] >= 0
        assert set(getattr(method, "quick_strengths", ())) <= set(method.strengths)
        assert "strength: " in method.about and "\n" not in method.about
        assert getattr(method, "timed", AT_ONCE) in TIMED
    timed = {method.name: getattr(method, "timed", AT_ONCE) for method in methods}
    assert timed["plain"] == timed["whisper-steer"] == timed["calm-whisper"] == AT_ONCE
    assert timed["whisper-steer+gate-vad"] == ALONE and timed["faster-whisper-batched-vad"] == FASTER
    assert timed["silero"] == timed["whisper-steer+vad"] == BEHIND_VAD
    assert timed["phrase-filter"] == JUDGED and timed["linear-gate"] == GATED


# -- judging --------------------------------------------------------------------------------------------


def test_judging_decodes_nothing_again(setup, model, monkeypatch) -> None:
    before = setup.plain(EVERY)
    monkeypatch.setattr(type(model), "decode", None)
    heard = list(judge(setup, EVERY, lambda _, kept: replace(kept, text=kept.text.upper())))
    assert [one.text for one in heard] == [one.text.upper() for one in before]
    assert [(one.nsp, one.hr) for one in heard] == [(one.nsp, one.hr) for one in before]
    assert all(one.seconds >= was.seconds > 0 for one, was in zip(heard, before, strict=True))


def test_no_speech_prob_alone_takes_confident_windows_too() -> None:
    kept = transcript((" Hello.", 0.2, -0.1), (" Thank you.", 0.7, -0.1))
    after = no_speech_prob.without_likely_silence(kept, 0.5)
    assert after.text == " Hello." and after.segments == kept.segments[:1]
    assert no_speech_prob.without_likely_silence(kept, 0.7) == kept  # above, not at the threshold
    nothing = no_speech_prob.without_likely_silence(kept, 0.1)
    assert nothing.text == "" and not nothing.nsp and not nothing.hr


def test_phrases_are_mined_by_frequency() -> None:
    texts = [" Bye. Go on.", " Bye.", " Go on.", " Bye!", " See.", ""]
    bag = phrase_filter.mine(texts, 100)
    reported = len(phrase_filter.REPORTED)
    assert bag[:2] == ("thank you", "thanks for watching")
    assert bag[reported:] == ("bye", "go on", "see")
    assert phrase_filter.mine(texts, reported + 1) == bag[: reported + 1]
    assert phrase_filter.mine([" Thank you.", " Thank you."], 100) == bag[:reported]  # no phrase twice


def test_phrases_go_as_whole_sentences_only() -> None:
    kept = transcript((" Thank you. I thank you all.", 0.2, -0.1), (" Bye! Thank you!", 0.9, -0.1))
    after = phrase_filter.without_phrases(kept, {"thank you", "bye"})
    assert after.text == " I thank you all."
    assert after.segments == ((0.0, 4.0, " I thank you all."),)
    assert (after.nsp, after.hr, after.greedy) == (kept.nsp, kept.hr, kept.greedy)
    assert phrase_filter.without_phrases(kept, set()) == kept


def test_phrase_filter_uses_as_many_phrases_as_its_strength(setup) -> None:
    method = phrase_filter.METHODS[0]
    method.prepare(setup)
    bag = method.phrases(setup)
    assert len(bag) > len(phrase_filter.REPORTED)  # the model wrote something over the tones
    silent = SETS["tones"]
    plain, filtered = setup.plain(silent), list(method.hear(setup, 300.0, silent))
    assert any(one.text for one in plain) and not any(one.text for one in filtered)
    few = list(method.hear(setup, float(len(phrase_filter.REPORTED)), silent))
    assert [one.text.strip() for one in few] == [one.text.strip() for one in plain]


# -- linear gate ----------------------------------------------------------------------------------------


def test_linear_gate_separates_and_its_threshold_rejects_the_share() -> None:
    rng = np.random.default_rng(0)
    speech = np.arange(200) < 100
    states = rng.normal(size=(200, 5)) * [1, 10, 1, 1, 100] + np.outer(speech, [4, 0, 0, 0, 0])
    gate = linear_gate.fit_gate(states, speech, np.arange(200) % 5)
    scores = np.array([gate.score(state) for state in states])
    assert np.mean((scores > 0) == speech) > 0.95
    assert np.allclose(scores, states @ gate.coef + gate.intercept)
    assert gate.held_out.shape == (100,) and np.corrcoef(gate.held_out, scores[:100])[0, 1] > 0.9
    for rejected in (0.0, 0.1, 0.5):
        assert np.mean(gate.held_out < gate.threshold(rejected)) == pytest.approx(rejected, abs=0.01)


def test_linear_gate_judges_clips_without_their_group_and_learns_from_no_untaught_ones() -> None:
    rng = np.random.default_rng(0)
    speech = np.arange(120) < 60
    states = rng.normal(size=(120, 3)) + np.outer(speech, [2, 0, 0])
    folds = np.arange(120) % 3
    taught = np.arange(120) % 10 != 0
    gate = linear_gate.fit_gate(states, speech, folds, taught)
    alone = linear_gate.fit_gate(states[taught], speech[taught], folds[taught])
    assert np.array_equal(gate.coef, alone.coef) and gate.intercept == alone.intercept
    assert gate.held_out.shape == (60,)  # all speech is judged, the untaught too
    assert np.allclose(gate.held_out[taught[:60]], alone.held_out)
    mine = folds == 1
    others = linear_gate.fit_gate(states[taught & ~mine], speech[taught & ~mine], folds[taught & ~mine])
    expected = states[mine & speech] @ others.coef + others.intercept
    assert np.allclose(gate.held_out[mine[:60]], expected)


def test_linear_gate_takes_all_clips_but_fits_on_no_voice_of_the_test_split(setup, monkeypatch) -> None:
    asked: list[tuple] = []

    def keep(states, speech, folds, taught):
        asked.append((len(states), speech.sum(), taught, folds))

    monkeypatch.setattr(linear_gate, "fit_gate", keep)
    monkeypatch.setattr(linear_gate, "_states", lambda setup, clips: np.zeros((len(clips), 2)))
    new = [replace(clip, id=f"new/{clip.id}", group="one voice") for clip in SETS["speech"]]
    setup.calibration = {"speech": SETS["speech"] * 3, "speech_new_voice": new, "tones": SETS["tones"]}
    setup.quick = False
    linear_gate._fit(setup)
    clips, speech, taught, folds = asked[0]
    assert (clips, speech) == (30, 24) and list(taught) == [*[True] * 18, *[False] * 6, *[True] * 6]
    assert len(set(folds[18:24])) == 1  # one voice is in one fold
    setup.quick = True
    linear_gate._fit(setup)
    assert asked[1][:2] == (12, 6)


def test_linear_gate_reads_the_frames_of_every_window(setup) -> None:
    from calibration.activations import encode_clip

    clip = SETS["tones"][0]
    frames = encode_clip(setup.model, clip.load(), [1]).frames[0].numpy()
    kept = transcript((" a", 0.5, -0.1))
    windows = (replace(kept.windows[0], size=100), replace(kept.windows[0], seek=100, size=100))
    states = linear_gate.window_states(frames, replace(kept, windows=windows))
    assert states.shape == (2, 32)
    assert np.allclose(states[0], frames[:50].mean(axis=0)) and np.allclose(
        states[1], frames[50:].mean(axis=0)
    )


def test_linear_gate_encodes_in_batches_what_a_clip_alone_gives(setup, monkeypatch) -> None:
    from calibration.activations import encode_clip

    long = np.concatenate([EVERY[6].load(), np.zeros(31 * 16_000, np.float32)])  # two windows
    group = [EVERY[0], replace(EVERY[1], id="long"), EVERY[7]]
    monkeypatch.setattr(setup, "audio", lambda clip: long if clip.id == "long" else clip.load())
    for batch in (2, 8):
        monkeypatch.setattr(linear_gate, "BATCH", batch)
        found = list(linear_gate.encoded(setup, group))
        for clip, (frames, seconds) in zip(group, found, strict=True):
            alone = encode_clip(setup.model, setup.audio(clip), [1]).frames[0].numpy()
            assert frames.shape == alone.shape and np.allclose(frames, alone, atol=1e-4) and seconds > 0
    assert found[1][1] == pytest.approx(2 * found[0][1])  # as many windows, as much of the batch's time


def test_linear_gate_withholds_tones_and_is_fitted_once(setup, monkeypatch) -> None:
    method = linear_gate.METHODS[0]
    heard = list(method.hear(setup, 0.001, EVERY))
    assert [bool(one.text) for one in heard[:6]] == [bool(one.text) for one in setup.plain(SETS["speech"])]
    assert not any(one.text or one.nsp or one.hr for one in heard[6:])
    setup.memory.clear()
    monkeypatch.setattr("calibration.activations.encode_windows", None)
    method.prepare(setup)  # from setup.cache
    setup.memory.clear()
    setup.calibration = {"tones": SETS["tones"]}
    with pytest.raises(Unavailable, match="fitted on speech and non-speech clips"):
        method.prepare(setup)


def test_linear_gate_counts_the_encoder_where_it_saves_the_decoder(setup) -> None:
    method = linear_gate.METHODS[0]
    clips, plain = EVERY[5:7], setup.plain(EVERY[5:7])
    method.prepare(setup)
    gate = setup.memory[linear_gate._GATE]
    scored = linear_gate._scores(setup, gate, clips)
    for number, clip in enumerate(clips):
        setup.memory[linear_gate._SCORES][clip] = replace(scored[clip], seconds=100.0 + number)
    speech, tone = method.hear(setup, 0.001, clips)
    assert speech.text == plain[0].text and plain[0].seconds <= speech.seconds < plain[0].seconds + 1
    assert tone.text == "" and tone.seconds == 101.0


# -- openai-whisper's thresholds ------------------------------------------------------------------------


def test_thresholds_reach_whisper(setup) -> None:
    by_name = {method.name: method for method in openai_thresholds.METHODS}
    clip = SETS["tones"][:1]
    (p,) = [greedy[0] for greedy in setup.plain_windows(clip)[0].greedy]
    method = by_name["openai-no-logprob-threshold"]
    assert [one.text for one in method.hear(setup, p * 0.99, clip)] == [""]
    (kept,) = method.hear(setup, min(1.0, p * 1.01), clip)
    assert kept.text
    strict = by_name["openai-logprob-threshold"].options(0.2)
    assert strict == {"logprob_threshold": -0.2}
    assert by_name["openai-no-speech-threshold"].options(0.4) == {"no_speech_threshold": 0.4}
    assert by_name["openai-no-skip-rule"].options(1.0) == {"no_speech_threshold": None}


def test_a_window_that_the_rule_skips_counts_as_recognised() -> None:
    greedy = ((0.3, -1.5), (0.7, -0.2), (0.7, -1.5))
    rules = {
        (): [False, False, True],
        (("logprob_threshold", None),): [False, True, True],
        (("no_speech_threshold", 0.2),): [True, False, True],
        (("logprob_threshold", -0.1), ("no_speech_threshold", 0.2)): [True, True, True],
        (("no_speech_threshold", None),): [False, False, False],
    }
    for options, expected in rules.items():
        assert [openai_thresholds.skips(*scores, dict(options)) for scores in greedy] == expected
    assert label_events([]) == (False, False) and label_events(greedy[1:]) == (False, True)
    assert label_events(greedy[2:]) == (False, False) and label_events(greedy[:1]) == (True, True)
    heard = Heard("", (), None, None, 1.0)
    events = [
        (found.nsp, found.hr)
        for options in rules
        for found in [openai_thresholds.judged_by(heard, greedy, dict(options))]
    ]
    assert events == [(True, True), (True, True), (False, True), (False, False), (True, True)]


# -- ours -----------------------------------------------------------------------------------------------


def test_ours_needs_a_steering_of_the_model(setup) -> None:
    with pytest.raises(Unavailable, match="no steering is bundled for nobody-kept-it: pass --steering FILE"):
        ours.METHODS[0].prepare(setup)


def test_the_fingerprint_follows_the_steering(setup, tmp_path) -> None:
    steerings = [
        Steering((Shift(1, torch.ones(32), strength),), None, model_metadata(setup.model))
        for strength in (1.0, 1.0, 2.0)
    ]
    first, same, other = map(ours.steering_hash, steerings)
    assert first == same != other
    steerings[2].save(tmp_path / "s.safetensors")
    setup.steering = str(tmp_path / "s.safetensors")
    assert ours.METHODS[0].fingerprint(setup) == ours.steering_hash(ours.steering_of(setup))


def test_the_multiple_is_the_best_within_the_budget(setup, monkeypatch) -> None:
    """What each multiple does is made up: a quarter silences most at no cost, the whole
    silences all and costs words."""
    left = {1 / 16: 5, 1 / 4: 2, 1.0: 0}
    applied: list[float] = []

    def transcribe(model, audios):
        (handle,) = handles_of(model)
        (edit,) = handle.steering.edits
        applied.append(edit.strength)
        spoken = "hello world" if edit.strength < 1 else "hello"
        silent = ["you" if index < left[edit.strength] else "" for index in range(len(audios) - 6)]
        return [transcript((text, 0.5, -0.1)) for text in (*silent, *[spoken] * 6)]

    for clip in EVERY:
        text = "hello world" if clip.kind == "speech" else "you"
        setup.labels[clip.id] = labels_of(transcript((text, 0.1, -0.1)))
    monkeypatch.setattr("calibration.decoding.transcribe_clips", transcribe)
    fitted = Shift(1, torch.ones(32), 1.0)
    assert ours.choose_multiple(setup, fitted) == 0.25
    assert applied == list(ours.QUICK_MULTIPLES) and handles_of(setup.model) == ()
    first = ours._calibrated(setup, "ours-shift", fitted)
    again = ours._calibrated(setup, "ours-shift", fitted)
    assert len(applied) == 6  # kept in setup.cache
    x = torch.zeros(2, 32)
    for edit in (first, again):  # strength 1 is the chosen multiple
        assert torch.equal(edit(x, 1.0), torch.full((2, 32), 0.25))


def test_ungated_forms_are_known_by_the_edit_that_was_fitted(setup) -> None:
    method = next(method for method in ours.METHODS if method.name == "ours-shift")
    method = replace(method, edit=lambda setup: Shift(1, torch.ones(32), 1.0))
    first = method.fingerprint(setup)
    assert method.fingerprint(setup) == first
    setup.memory.clear()
    assert replace(method, edit=lambda setup: Shift(0, torch.ones(32), 1.0)).fingerprint(setup) != first


def test_strength_1_of_latents_is_the_chosen_multiple() -> None:
    sae = random_sae(5, d=32, n=40, layer=1)
    edit = LatentEdit.from_sae(sae, [3, 8, 30], torch.tensor([1.0, -2.0, 0.5]), floor=True)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    scaled = replace(ours.times(edit, 0.25), strength=2.0)
    assert torch.allclose(scaled(x, 1.0), replace(edit, strength=0.5)(x, 1.0))
    assert not torch.equal(scaled(x, 1.0), x)


def test_our_gate_alone_says_what_the_steered_model_says(setup, model) -> None:
    """Judged from plain Whisper's words; the model itself, steered, writes the same."""
    method, d = ours_gate.METHODS[0], model.dims.n_audio_state
    gate = raw_gate(torch.randn(d, generator=torch.Generator().manual_seed(2)), 0.0)
    found = ours_gate.window_logits(setup, gate, EVERY, setup.plain_windows(EVERY))
    middle = float(np.median([logit for windows in found for logit in windows]))
    gate = replace(gate, threshold=middle, spread=0.01)
    shift = Shift(1, torch.ones(d), 9.0)
    setup.memory["steering"] = Steering((shift,), gate, model_metadata(model))
    withheld = []
    for alpha in (0.5, 1.0, 2.0):
        judged = [heard.text for heard in method.hear(setup, alpha, EVERY)]
        with steer(model, alpha=alpha, steering=Steering((), gate, model_metadata(model))):
            steered = transcribe_clips(model, [setup.audio(clip) for clip in EVERY])
        assert judged == [transcript.text for transcript in steered]
        withheld.append(sum(not text for text in judged))
    assert 0 < withheld[0] <= withheld[1] <= withheld[2] and withheld[1] < len(EVERY)
    setup.memory["steering"] = Steering((shift,), None, model_metadata(model))
    with pytest.raises(Unavailable, match="a steering with a gate"):
        method.prepare(setup)
