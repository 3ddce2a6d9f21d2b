"""Sentences, procedural sounds, espeak-ng's times, augmentation and the corpus' splits."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import augmentation, corpus, grammar, noises, synthesis
from whisper_steer.errors import ModelError, UsageError

espeak = pytest.importorskip("calibration.espeak", reason="espeakng-loader is not installed")


def test_sentences_are_filled_in_and_capitalised():
    rng = random.Random(0)
    sentences = [grammar.sentence(rng) for _ in range(500)]
    assert all(s[0].isupper() and s[-1] in ".?!" and "{" not in s for s in sentences)
    assert len(set(sentences)) > 450
    assert grammar.sentence(random.Random(5)) == grammar.sentence(random.Random(5))


@given(st.text(min_size=1))
def test_every_sentence_has_one_split(text):
    assert synthesis.split_of(text) == synthesis.split_of(text)
    assert synthesis.split_of(text) in corpus.SPLITS


def test_drawn_sentences_keep_to_their_split():
    rng = random.Random(1)
    drawn = {split: {synthesis.draw_sentence(rng, split) for _ in range(40)} for split in corpus.SPLITS}
    assert all(synthesis.split_of(s) == split for split, sentences in drawn.items() for s in sentences)
    assert not drawn["train"] & drawn["test"]


def test_speech_comes_with_word_and_phoneme_times():
    text = "Turn on the kitchen light."
    spoken = espeak.speak(text, espeak.Voice("en-us", "", 160))
    seconds = len(spoken.audio) / 16000
    assert spoken.audio.dtype == np.float32 and 1.0 < seconds < 2.0
    assert 0.2 < np.abs(spoken.audio).max() <= 1.1
    positions = [position for position, _ in spoken.words]
    assert positions[0] == 0 and {text.index("kitchen"), text.index("light")} <= set(positions)
    starts = [start for _, start in spoken.phonemes]
    assert starts == sorted(starts) and starts[-1] <= seconds + 0.05
    names = [name for name, _ in spoken.phonemes]
    assert names.count("k") == 1 and names.count("tS") == 1 and not any("'" in name for name in names)
    # faster speech is shorter
    assert len(espeak.speak(text, espeak.Voice("en-us", "", 250)).audio) < 0.8 * len(spoken.audio)


def test_an_unknown_voice_is_one_clear_error():
    with pytest.raises(ModelError, match="no voice 'xx-nowhere'"):
        espeak.speak("Hello.", espeak.Voice("xx-nowhere"))


@pytest.mark.parametrize("category", noises.CATEGORIES)
def test_every_generator_gives_finite_sound_of_the_asked_length(category):
    for name, generator in noises.GENERATORS[category].items():
        clip = np.asarray(generator(24000, np.random.default_rng(3)))
        assert clip.shape == (24000,) and np.isfinite(clip).all(), name
        assert name == "silence" or clip.std() > 0, name
    name, audio = noises.non_speech(category, 1.5, np.random.default_rng(0))
    again = noises.non_speech(category, 1.5, np.random.default_rng(0))
    assert audio.dtype == np.float32 and len(audio) == 24000 and np.abs(audio).max() <= 0.9
    assert name == again[0] and np.array_equal(audio, again[1])


@settings(max_examples=20, deadline=None)
@given(st.floats(-10, 30), st.integers(0, 1000))
def test_mixing_reaches_the_asked_ratio(snr, seed):
    rng = np.random.default_rng(seed)
    speech = (rng.standard_normal(16000) * 0.1).astype(np.float32)
    noise = (rng.standard_normal(5000) * 0.4).astype(np.float32)
    added = augmentation.mix_at_snr(speech, noise, snr) - speech
    reached = 20 * np.log10(augmentation.active_rms(speech) / augmentation.active_rms(added))
    assert reached == pytest.approx(snr, abs=0.05)


def test_rooms_keep_length_and_direct_sound():
    click = np.zeros(16000, np.float32)
    click[100] = 1
    wet = augmentation.reverberate(click, np.random.default_rng(0), (0.3, 0.3))
    assert len(wet) == 16000 and np.abs(wet[:100]).max() < 1e-6 and wet[100] == pytest.approx(1, abs=1e-3)
    early, late = (wet[101:1700] ** 2).sum(), (wet[3300:4900] ** 2).sum()
    assert early > 100 * late > 0


def test_shards_are_written_once_and_read_back(tmp_path):
    command = [
        sys.executable,
        "-m",
        "calibration.synthesis",
        "--out",
        str(tmp_path),
        "--utterances",
        "6",
        "--non-speech",
        "5",
        "--workers",
        "1",
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 new shards" in first.stdout
    bytes_before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "0 new shards" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    speech = synthesis.Shards.open(tmp_path, "speech")
    assert len(speech) == 6 and all(len(speech.audio(i)) == speech.records[i]["samples"] for i in range(6))
    other = synthesis.Shards.open(tmp_path, "nonspeech")
    assert [record["category"] for record in other.records] == list(noises.CATEGORIES)
    for path in tmp_path.iterdir():  # the same seed gives the same bytes in another process
        path.unlink()
    subprocess.run(command, capture_output=True, check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == bytes_before


def test_a_telephone_passes_the_voice_band_only():
    seconds = np.arange(16_000) / 16_000

    def level(hz):  # dB that a tone of that frequency keeps beside one of 1 kHz
        both = 0.2 * np.sin(2 * np.pi * 1000 * seconds) + 0.2 * np.sin(2 * np.pi * hz * seconds)
        spectrum = np.abs(np.fft.rfft(augmentation.telephone(both, np.random.default_rng(0))))
        return 20 * np.log10(spectrum[hz] / spectrum[1000])

    assert level(700) == pytest.approx(0, abs=0.5) and level(2500) == pytest.approx(0, abs=1)
    assert level(60) < -30 and level(5000) < -40 and level(7000) < -40
    tone = (0.3 * np.sin(2 * np.pi * 1000 * seconds)).astype(np.float32)[:15_999]
    heard = augmentation.telephone(tone, np.random.default_rng(1))
    assert heard.dtype == np.float32 and heard.shape == tone.shape
    assert np.abs(heard).max() == pytest.approx(0.3, rel=1e-5)
    noise = heard[2000:-2000] - tone[2000:-2000] * (heard[2000:-2000] @ tone[2000:-2000]) / (
        tone[2000:-2000] @ tone[2000:-2000]
    )
    assert np.std(noise) < 0.25  # phase apart, a tone stays that tone
    assert not augmentation.telephone(np.zeros(80, np.float32), np.random.default_rng(0)).any()


def test_every_second_real_clip_comes_over_a_telephone_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WHISPER_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus, "_SIZES", {})
    monkeypatch.setattr(corpus, "_make_missing", lambda *_: None)
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(8000).astype(np.float32) for _ in range(3)]
    clips = [
        corpus.Clip(
            f"speech/{i}",
            "real_speech",
            "real_speech",
            "test",
            "Hello.",
            f"g{i}",
            path="f",
            audio=lambda i=i: sounds[i],
        )
        for i in range(3)
    ]
    monkeypatch.setattr(corpus, "real_clips", lambda data_dir, split: clips)
    sets = corpus.eval_sets("test", tmp_path)
    assert [clip.id for clip in sets["real_telephone"]] == ["speech/0#telephone", "speech/2#telephone"]
    first, second = sets["real_telephone"]
    assert first.text == "Hello." and first.group == "g0" and first.kind == "real_speech"
    assert np.array_equal(first.load(), first.load()) and not np.allclose(first.load(), sounds[0], atol=0.1)
    spectrum = np.abs(np.fft.rfft(second.load())) ** 2  # 0.5 s: bins of 2 Hz
    assert spectrum[2100:].sum() < 1e-3 * spectrum[200:1400].sum()


def test_evaluation_sets_are_cached_and_described(tmp_path, monkeypatch):
    monkeypatch.setenv("WHISPER_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus, "_SIZES", {"speech": (4, 2), "speech_sparse": (2, 1), "tones": (3, 2)})
    sets = {name: corpus._make_set(name, "test", True) for name in corpus._SIZES}
    assert [len(clips) for clips in sets.values()] == [2, 1, 2]
    record, audio = sets["speech_sparse"][0]
    (start, end) = record["intervals"][0]
    assert len(audio) == 30 * 16000 and len(record["text"].split()) == 2
    inside = np.abs(audio[int(start * 16000) : int(end * 16000)]).max()
    assert inside > 20 * np.abs(audio[: int(start * 16000)]).max()
    assert all(synthesis.split_of(record["text"]) == "test" for record, _ in sets["speech"])
    with pytest.raises(UsageError, match="expected 'calibration' or 'test'"):
        corpus.eval_sets("train")


def test_real_manifests_are_split_by_group(tmp_path):
    header = "file,label,transcript,speaker,source,source_path,group,vocals,speech_risk\n"
    folder = tmp_path / "sounds"
    folder.mkdir()
    rows = "".join(
        f"a{i}.flac,rain,,,esc10,p,rec{i // 2},,{'unknown' if i == 9 else 'no'}\n" for i in range(10)
    )
    (folder / "manifest.csv").write_text(header + rows)
    clips = [clip for split in corpus.SPLITS for clip in corpus.real_clips(tmp_path, split)]
    assert sorted(clip.id for clip in clips) == [
        f"sounds/a{i}.flac" for i in range(9)
    ]  # "unknown" is left out
    splits = {}
    for clip in clips:
        assert splits.setdefault(clip.group, clip.split) == clip.split
        assert clip.kind == "nonspeech" and clip.category == "sounds"
    assert corpus.real_clips(None, "test") == [] == corpus.real_clips(tmp_path / "none", "test")
