import numpy as np
import pytest
from calibration_tools import RATE

from calibration import augmentation
from calibration.synthesis import write_shard
from calibration.training_clips import (
    CONDITIONS,
    TrainingClip,
    active_intervals,
    clean_sounds,
    clean_speech,
    frame_levels,
    make_variant,
    some_altered,
    some_snippets,
    training_clips,
)
from whisper_steer.errors import UsageError


def utterance(seconds=2.0, lead=0.5):
    rng = np.random.default_rng(0)
    audio = np.zeros(int((lead + seconds + 0.5) * RATE), np.float32)
    first = int(lead * RATE)
    audio[first : first + int(seconds * RATE)] = 0.2 * rng.standard_normal(int(seconds * RATE))
    return audio


def test_levels_are_relative_to_the_loudest_frame():
    audio = np.concatenate([np.full(320, 0.5), np.full(320, 0.05), np.zeros(320)]).astype(np.float32)
    assert frame_levels(audio).tolist() == pytest.approx([0.0, -20.0, -np.inf])
    assert frame_levels(np.zeros(640, np.float32)).tolist() == [-np.inf, -np.inf]


def test_intervals_bridge_short_gaps_only():
    audio = utterance(1.0)
    audio[int(0.9 * RATE) : int(1.0 * RATE)] = 0  # 0.1 s
    assert active_intervals(audio) == ((0.5, 1.5),)
    double = np.concatenate([audio, audio])
    assert active_intervals(double) == ((0.5, 1.5), (2.5, 3.5))
    assert active_intervals(np.zeros(RATE, np.float32)) == ()


@pytest.mark.parametrize("condition", sorted(set(CONDITIONS)))
def test_variants_know_where_the_speech_is(condition):
    rng = np.random.default_rng(3)
    audio, intervals = make_variant(
        utterance(), condition, rng, lambda s: 0.1 * np.ones(int(s * RATE), np.float32)
    )
    assert audio.dtype == np.float32 and np.isfinite(audio).all()
    ((start, end),) = intervals
    assert end - start == pytest.approx(2.0)
    if condition in ("sparse", "embedded"):
        assert len(audio) >= 8 * RATE
        if condition == "sparse":
            assert len(audio) == 30 * RATE
            outside = np.delete(audio, slice(int(start * RATE), int(end * RATE)))
            assert np.abs(outside).max() < 0.01 < np.abs(audio).max()
    else:
        assert start == pytest.approx(0.5) and len(audio) == len(utterance())
    if condition == "quiet":
        assert np.abs(audio).max() < 0.05


def test_unknown_condition():
    with pytest.raises(UsageError, match="condition is 'loud'"):
        make_variant(utterance(), "loud", np.random.default_rng(0), lambda s: np.zeros(1, np.float32))


@pytest.fixture
def corpus(tmp_path):
    speech = [
        ({"text": "x", "voice": "en-us+whisper" if i % 5 == 0 else "en-us+m1"}, utterance())
        for i in range(20)
    ]
    other = [({"category": "tones", "generator": "sine"}, utterance(3.0)) for _ in range(6)]
    write_shard(tmp_path / "speech_000.jsonl", speech)
    write_shard(tmp_path / "nonspeech_000.jsonl", other)
    return tmp_path


def test_clips_of_a_corpus_repeat_and_cover_every_condition(corpus):
    made = training_clips(corpus, None, speech=18, nonspeech=4)
    by_kind = {kind: [clip for clip in made if clip.kind == kind] for kind in ("speech", "nonspeech")}
    assert len(by_kind["speech"]) == 18 and len(by_kind["nonspeech"]) == 4
    assert {clip.condition for clip in by_kind["speech"]} == {*CONDITIONS, "whispered"}
    assert all(clip.make()[1] == () and clip.condition == "tones" for clip in by_kind["nonspeech"])
    again = training_clips(corpus, None, speech=18, nonspeech=4)
    assert [clip.id for clip in again] == [clip.id for clip in made]
    for one, other in zip(made, again, strict=True):
        assert np.array_equal(one.load(), other.load()) and np.array_equal(one.load(), one.load())
        assert one.silence_is_certain
    assert len({clip.id for clip in made}) == len(made)


def test_clips_come_over_a_telephone_too(corpus):
    plain = training_clips(corpus, None, speech=18, nonspeech=4)
    made = training_clips(corpus, None, speech=18, nonspeech=4, telephone=True)
    assert [clip.id for clip in made[:22]] == [clip.id for clip in plain]  # the others stay as they are
    assert [clip.id for clip in made[22:]] == [f"{clip.id}#telephone" for clip in plain[::2]]
    assert {clip.kind for clip in made[22:]} == {"speech", "nonspeech"}
    for before, after in zip(plain[::2], made[22:], strict=True):
        assert after.condition == "telephone" and after.make()[1] == before.make()[1]
        spectrum = np.abs(np.fft.rfft(after.load())) ** 2
        high = int(len(spectrum) * 4.2 / 8)  # nothing above 4 kHz comes out of 8 kHz sampling
        assert spectrum[high:].sum() < 1e-3 * spectrum.sum()
        assert np.array_equal(after.load(), after.load())


def tone(hertz, seconds):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def pitch(x):
    return float(np.fft.rfftfreq(len(x), 1 / RATE)[np.abs(np.fft.rfft(x)).argmax()])


def test_speed_changes_pitch_and_tempo():
    slow = augmentation.at_speed(tone(400, 2.0), 80)
    assert len(slow) == 2.5 * RATE and pitch(slow) == pytest.approx(320, abs=1) and slow.dtype == np.float32


def test_real_recordings_come_altered_too():
    def clip(name, kind, condition, audio):
        intervals = ((0.5, 1.0), (31.0, 32.0)) if kind != "nonspeech" else ()
        return TrainingClip(name, kind, condition, lambda: (audio, intervals))

    clips = [
        clip("dog", "nonspeech", "sounds", tone(500, 2.0)),
        clip("rain", "nonspeech", "sounds", tone(3000, 2.0)),
        clip("corpus-nonspeech/1", "nonspeech", "tones", tone(100, 2.0)),
        clip("dog#telephone", "nonspeech", "telephone", tone(500, 2.0)),
        clip("ann", "real_speech", "clean", tone(1000, 33.0)),
        clip("ann#noisy", "real_speech", "noisy", tone(1000, 33.0)),
        clip("corpus-speech/1", "speech", "clean", tone(100, 2.0)),
    ]
    made = some_altered(clips)
    assert [one.id for one in made] == ["dog#altered", "rain#altered", "ann#altered"]
    assert [one.kind for one in made] == ["nonspeech", "nonspeech", "real_speech"]
    assert all(np.array_equal(one.load(), one.load()) for one in made)
    dog, ann = made[0].load(), made[2].load()
    speed = 2.0 * RATE / len(dog)
    power = np.abs(np.fft.rfft(dog)) ** 2
    near = np.abs(np.fft.rfftfreq(len(dog), 1 / RATE) - 500 * speed) < 5
    assert 0.8 <= speed <= 1.25 and power[near].sum() > 0.2 * power.sum()  # at least -5 dB against the other
    slower = len(ann) / RATE / 30  # of the first 30 s
    assert pitch(ann) == pytest.approx(1000 / slower, rel=0.01)
    assert made[2].make()[1] == ((pytest.approx(0.5 * slower, rel=1e-3), pytest.approx(slower, rel=1e-3)),)
    assert not np.array_equal(some_altered(clips, seed=1)[0].load(), dog)


def test_snippets_are_a_word_long_and_of_speech_where_it_is_loud():
    def clip(name, kind, condition, audio):
        return TrainingClip(name, kind, condition, lambda: (audio, ((0.0, 1.0),)), f"group of {name}")

    spoken = np.concatenate([np.zeros(8 * RATE, np.float32), tone(300, 2.0), np.zeros(8 * RATE, np.float32)])
    clips = [
        clip("dog", "nonspeech", "sounds", tone(500, 9.0)),
        clip("corpus-nonspeech/1", "nonspeech", "tones", tone(100, 2.0)),
        clip("dog#telephone", "nonspeech", "telephone", tone(500, 2.0)),
        clip("ann", "real_speech", "clean", spoken),
        clip("bob", "real_speech", "clean", tone(300, 0.3)),
        clip("ann#noisy", "real_speech", "noisy", spoken),
        clip("ann#telephone", "real_speech", "telephone", spoken),
        clip("ann#noisy#telephone", "real_speech", "telephone", spoken),
    ]
    made = some_snippets(clips)
    names = ["dog#snippet0", "dog#snippet1"] + [f"{n}#snippet{i}" for n in ("ann", "bob") for i in range(3)]
    assert [one.id for one in made] == names
    assert {one.group for one in made} == {"group of dog", "group of ann", "group of bob"}
    for one in made:
        audio, intervals = one.make()
        assert np.array_equal(audio, one.load()) and np.isfinite(audio).all()  # the same again
        assert len(audio) <= (1.6 / 0.8 + 0.8) * RATE and bool(intervals) == (one.kind != "nonspeech")
    cut = made[2].load()
    assert 0.35 * RATE <= len(cut) <= 2.4 * RATE
    assert pitch(cut) == pytest.approx(300, abs=3)  # the tone was found in 18 s of which it is 2
    assert pitch(made[5].load()) == pytest.approx(300, abs=5)  # too short to cut: the whole of it
    assert [one.id for one in clean_speech(clips)] == ["ann", "bob", "ann#telephone"]
    assert [one.id for one in clean_sounds(clips)] == ["dog"]


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UsageError, match="no training clips in corpus .*calibration.synthesis"):
        training_clips(tmp_path, None)
