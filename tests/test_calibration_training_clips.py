import numpy as np
import pytest
from calibration_tools import RATE

from calibration.synthesis import write_shard
from calibration.training_clips import (
    CONDITIONS,
    active_intervals,
    frame_levels,
    make_variant,
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


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UsageError, match="no training clips in corpus .*calibration.synthesis"):
        training_clips(tmp_path, None)
