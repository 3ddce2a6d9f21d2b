import json
import threading
from itertools import islice

import numpy as np
import pytest
from audio_files import write_wav
from calibration_tools import RATE, FakeClip, sound
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.augmentation import active_rms
from calibration.mixture import AudioItem, Augmentation, Dataset, Mixture
from calibration.plan import Skipped, Window, WindowPlan
from whisper_steer.errors import AudioError, UsageError


def mixture():
    return Mixture.of([FakeClip(f"c{i}", "nonspeech" if i == 2 else "speech", 2.0 + i) for i in range(3)])


def plan(share=0.5, seed=0, cache_bytes=2**20, **options):
    return WindowPlan(mixture(), seed=seed, packed_share=share, cache_bytes=cache_bytes, **options)


def same(a, b):
    return np.array_equal(a.audio, b.audio) and a.pieces == b.pieces


def test_a_window_depends_on_seed_round_shard_and_index_alone():
    one, other = plan(), plan(cache_bytes=0)
    keys = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (3, 2, 7)]
    made = {key: one.window(*key) for key in keys}
    for key in reversed(keys):
        assert same(other.window(*key), made[key])
    assert not any(
        same(made[a], made[b]) for i, a in enumerate(keys) for b in keys[i + 1 :] if len(made[a].pieces) > 1
    )
    packed = next(key for key in keys if len(made[key].pieces) > 1)
    assert not same(plan(seed=1).window(*packed), made[packed])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(0, 50), st.integers(0, 3))
def test_threads_change_nothing(workers, round_index, shard):
    alone = list(islice(plan(max_samples=RATE * 5).windows(round_index, shard), 5))
    ahead = list(islice(plan(max_samples=RATE * 5, workers=workers).windows(round_index, shard), 5))
    assert all(same(a, b) for a, b in zip(alone, ahead, strict=True))
    assert same(alone[3], plan(max_samples=RATE * 5).window(round_index, shard, 3))


def test_threads_end_with_the_iterator_and_pass_errors_on():
    windows = plan(workers=2).windows(0)
    next(windows)
    windows.close()
    broken = WindowPlan(Mixture([Dataset("d", 1.0, [missing(0)])]), seed=0, workers=2)
    with pytest.raises(AudioError, match="no such file"):
        next(broken.windows(0))
    for thread in threading.enumerate():
        if thread.name.startswith("window"):
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_packed_windows_are_full_single_ones_are_clips():
    packed = plan(1.0).window(0, 0, 0)
    assert packed.audio.shape == (30 * RATE,) and packed.audio.dtype == np.float32
    assert len(packed.pieces) > 4
    for (_, end, _), (start, _, _) in zip(packed.pieces, packed.pieces[1:], strict=False):
        assert 0 <= start - end < RATE // 2
        assert not packed.audio[end:start].any()
    for start, end, domain in packed.pieces[:-1]:
        seconds = (end - start) / RATE
        assert seconds in (2.0, 3.0, 4.0) and (domain == "sounds") == (seconds == 4.0)
        assert 0.05 - 1e-3 <= np.abs(packed.audio[start:end]).max() <= 0.5 + 1e-3
    assert packed.pieces[-1][1] <= 30 * RATE
    single = plan(0.0).window(0, 0, 0)
    clip = next(c for c in mixture().datasets[0].items if len(c.load()) == len(single.audio))
    assert single.pieces == ((0, len(single.audio), clip.domain),)
    assert np.array_equal(single.audio, clip.load().astype(np.float16).astype(np.float32))


def test_long_clips_give_random_parts():
    ramp = np.arange(10 * RATE, dtype=np.float32) / (10 * RATE)
    item = AudioItem("a", "d", "music", audio=lambda: ramp)
    p = WindowPlan(Mixture([Dataset("d", 1.0, [item])]), seed=0, packed_share=0.0, max_samples=RATE)
    starts = [p.window(0, 0, index).audio for index in range(20)]
    assert all(len(audio) == RATE for audio in starts)
    assert min(audio[0] for audio in starts) < 0.3 and max(audio[0] for audio in starts) > 0.6


def test_long_files_are_decoded_in_part(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    write_wav(path, np.arange(150 * RATE, dtype=np.float32) / (150 * RATE))

    def whole(_path):
        raise AudioError("decoded as a whole")

    item = AudioItem("a", "d", "music", path=str(path))
    mix = Mixture([Dataset("d", 1.0, [item])])
    monkeypatch.setattr("calibration.mixture.load_audio", whole)
    p = WindowPlan(mix, seed=0, packed_share=0.0, max_samples=RATE)
    parts = [p.window(0, 0, index).audio for index in range(20)]
    assert all(len(part) == RATE and part[-1] - part[0] == pytest.approx(1 / 150, abs=1e-3) for part in parts)
    assert min(part[0] for part in parts) < 0.3 and max(part[0] for part in parts) > 0.6
    assert all(np.array_equal(p.window(0, 0, i).audio, parts[i]) for i in (3, 0))
    assert len(p.skipped) == 0


def test_a_wrong_length_falls_back_to_the_whole_file(tmp_path):
    write_wav(tmp_path / "a.wav", np.full(2 * RATE, 0.5))
    item = AudioItem("a", "d", "music", duration=5000.0, path=str(tmp_path / "a.wav"))
    p = WindowPlan(Mixture([Dataset("d", 1.0, [item])]), seed=0, packed_share=0.0, max_samples=RATE)
    assert all(len(p.window(0, 0, index).audio) == RATE for index in range(5)) and len(p.skipped) == 0


def test_frame_domains_by_hand():
    window = Window(
        np.zeros(3200, np.float32), ((0, 1000, "speech"), (1120, 2000, "music"), (2000, 3200, "sounds"))
    )
    # middles of the frames: 160, 480, 800, 1120, 1440, 1760, 2080, ...
    assert window.frame_domains(10).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert window.frame_domains(10).dtype == np.uint8
    assert window.frame_domains(12).tolist()[10:] == [2, 2]  # an encoder may round the length up
    assert window.frame_domains(4, 800).tolist() == [0, 1, 2, 2]  # middles 400, 1200, 2000, 2800


def test_settings_are_those_that_decide_the_windows():
    p = plan(0.5, seed=3, workers=1)
    found = p.settings()
    assert json.loads(json.dumps(found)) == found
    assert found == {"mixture": p.mixture.settings(), "seed": 3, "packed_share": 0.5, "max_samples": 480_000}
    assert p.settings() == plan(0.5, seed=3, cache_bytes=0).settings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1: expected at least 0"),
        ({"share": 1.5}, "packed_share is 1.5: expected 0 to 1"),
        ({"share": float("nan")}, "packed_share is nan"),
        ({"max_samples": 100}, "max_samples is 100: expected at least 320"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        plan(**options)


# -- augmentation


def augmented(noise, music, snr=(10.0, 10.0)):
    def item(name, domain, audio):
        return AudioItem(name, "d", domain, audio=lambda: audio)

    speech = sound("speech", 3.0, speech=True)
    items = [
        item("speech", "speech", speech),
        item("noise", "sounds", 0.1 * np.ones(2 * RATE, np.float32)),
        item("music", "music", sound("music", 20.0, speech=False)),
    ]
    mix = Mixture([Dataset("d", 1.0, items)], augmentation=Augmentation(noise, music, snr))
    return speech.astype(np.float16).astype(np.float32), WindowPlan(mix, seed=0, packed_share=0.0)


def drawn_speech(p):
    for index in range(200):
        window = p.window(0, 0, index)
        if window.pieces[0][2] == "speech":
            yield window.audio


def test_noise_is_added_at_its_ratio():
    speech, p = augmented(1.0, 0.0)
    audio = next(drawn_speech(p))
    added = audio - speech
    assert np.ptp(added) < 1e-6 and added.max() > 0  # the constant that plays the noise, looped
    ratio = 20 * np.log10(active_rms(speech) / active_rms(added))
    assert ratio == pytest.approx(10.0, abs=0.01)
    assert next(drawn_speech(p)).tolist() == audio.tolist()


def test_ratios_are_uniform_in_their_range_and_the_chance_is_kept():
    speech, p = augmented(0.5, 0.0, (0.0, 20.0))
    ratios = []
    total = 0
    for audio in drawn_speech(p):
        total += 1
        added = audio - speech
        if added.any():
            ratios.append(20 * np.log10(active_rms(speech) / active_rms(added)))
    assert 0.3 < len(ratios) / total < 0.7
    assert all(-0.1 <= ratio <= 20.1 for ratio in ratios)
    assert min(ratios) < 6 and max(ratios) > 14


def test_music_comes_from_the_music():
    speech, p = augmented(0.0, 1.0)
    added = next(drawn_speech(p)) - speech
    pitch = np.abs(np.fft.rfft(added)).argmax()
    expected = np.abs(np.fft.rfft(sound("music", 3.0, speech=False))).argmax()
    assert abs(int(pitch) - int(expected)) <= 1


# -- unreadable audio


def missing(number):
    return AudioItem(f"m{number}", "d", "speech", path=f"/nowhere/{number}.wav")


def good(number):
    return AudioItem(f"g{number}", "d", "music", audio=lambda: np.full(RATE, 0.25, np.float32))


def test_unreadable_items_are_skipped_and_listed_once(tmp_path):
    empty = AudioItem("empty", "d", "speech", audio=lambda: np.zeros(0, np.float32))

    def interrupted():
        raise OSError("stale file handle")

    items = [missing(0), good(0), empty, AudioItem("os", "d", "speech", audio=interrupted), good(1)]
    p = WindowPlan(Mixture([Dataset("d", 1.0, items)]), seed=0, max_samples=2 * RATE, workers=2)
    windows = list(islice(p.windows(0), 40))
    assert all(domain == "music" for window in windows for _, _, domain in window.pieces)
    other = WindowPlan(Mixture([Dataset("d", 1.0, items)]), seed=0, max_samples=2 * RATE)
    assert all(same(a, b) for a, b in zip(windows, islice(other.windows(0), 40), strict=True))
    records = {record["path"]: record for record in p.skipped.records}
    assert set(records) == {"/nowhere/0.wav", "d/empty", "d/os"} and len(p.skipped) == 3
    assert records["/nowhere/0.wav"]["reason"] == "/nowhere/0.wav: no such file"
    assert records["d/os"] == {"path": "d/os", "dataset": "d", "id": "os", "reason": "stale file handle"}
    assert "no samples" in records["d/empty"]["reason"]
    p.skipped.write(tmp_path / "skipped.jsonl")
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == p.skipped.records
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


def test_a_skipped_item_is_listed_once_whoever_finds_it():
    skipped = Skipped()
    threads = [threading.Thread(target=skipped.add, args=(missing(i % 5), "why")) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record["id"] for record in skipped.records) == [f"m{i}" for i in range(5)]


def test_nothing_readable_is_an_error():
    p = WindowPlan(Mixture([Dataset("d", 1.0, [missing(i) for i in range(3)])]), seed=0)
    with pytest.raises(
        AudioError, match=r"100 drawn audio files in a row cannot be read, the first: .*no such file"
    ):
        p.window(0, 0, 0)


def test_more_bad_than_good_files_is_an_error():
    items = [missing(i) for i in range(400)] + [good(i) for i in range(200)]
    p = WindowPlan(Mixture([Dataset("d", 1.0, items)]), seed=0, packed_share=0.0)
    with pytest.raises(AudioError, match=r"1\d\d of 200 audio files cannot be read, the first: /nowhere/"):
        for index in range(600):
            p.window(0, 0, index)
    assert len(p.skipped) <= 200
